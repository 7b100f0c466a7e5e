"""`titan-peer merge`: the means of the weights of several checkpoints, as a checkpoint that every command takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_jobs import flip_a_bit, tensors_of, trainer

from titan_peer.checkpoint import files, merge
from titan_peer.checkpoint.files import verify
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.commands import main as cli
from titan_peer.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def from_the_repository_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job with checkpoints of the steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("job")
    trainer(folder, "--training.ema_decay", 0.5, "--lr_scheduler.warmup_steps", 0).train()
    return folder


def merged(job: Path, output: Path, *arguments: object) -> int:
    return cli.main(["merge", "--checkpoint", str(job), "--output", str(output), *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "steps", "prefix"),
    [
        (["--last", 3], [2, 4, 6], "model."),
        (["--steps", 4, 2], [2, 4], "model."),
        (["--last", 2, "--ema"], [4, 6], "ema."),
    ],
    ids=["the last three", "named steps", "averages"],
)
def test_the_merged_weights_are_the_means(arguments, steps, prefix, job: Path, tmp_path: Path, capsys) -> None:
    assert merged(job, tmp_path / "out", *arguments) == 0
    folder = tmp_path / f"out/step-{steps[-1]}"
    assert capsys.readouterr().out.strip() == str(folder)
    verify(folder)
    found = tensors_of(folder)
    sources = [tensors_of(job / f"checkpoint/step-{step}") for step in steps]
    names = [name.removeprefix(prefix) for name in sources[0] if name.startswith(prefix)]
    assert found.keys() == {f"model.{name}" for name in names} and any("running_var" in name for name in names)
    for name in names:
        mean = torch.stack([source[prefix + name].double() for source in sources]).mean(0)
        torch.testing.assert_close(found[f"model.{name}"].double(), mean, rtol=1e-6, atol=1e-8)
    state = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
    assert state["step"] == steps[-1] and state["merged"] == [str(job / f"checkpoint/step-{step}") for step in steps]


def test_every_command_takes_a_merged_checkpoint(job: Path, tmp_path: Path, capsys) -> None:
    assert merged(job, tmp_path / "out", "--last", 2, "--dtype", "bfloat16") == 0
    stored = tensors_of(tmp_path / "out/step-6")
    assert {t.dtype for n, t in stored.items() if "running" in n} == {torch.float32}
    assert {t.dtype for n, t in stored.items() if "running" not in n} == {torch.bfloat16}
    model = load_model_for_inference(tmp_path / "out", mmap_tables=True)[0]
    assert all(torch.equal(t.float(), stored[f"model.{name}"].float()) for name, t in model.state_dict().items())
    checkpoint = ["--checkpoint", str(tmp_path / "out")]
    (tmp_path / "held_out.txt").write_text("In the beginning", encoding="utf-8")
    assert cli.main(["eval", *checkpoint, "--perplexity", str(tmp_path / "held_out.txt")]) == 0
    assert cli.main(["generate", *checkpoint, "--prompt", "In", "--max_new_tokens", "2"]) == 0
    assert cli.main(["export", *checkpoint, "--output", str(tmp_path / "exported")]) == 0
    started = trainer(tmp_path / "new", "--checkpoint.initial_load_path", tmp_path / "out")
    assert torch.equal(started.model.output.weight, stored["model.output.weight"].float())
    with pytest.raises(UserError, match=r"needs checkpoint\.initial_load_model_only = true"):
        more = ["--checkpoint.initial_load_path", tmp_path / "out", "--checkpoint.initial_load_model_only", "false"]
        trainer(tmp_path / "newer", *more)


def test_one_tensor_is_read_at_a_time(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def count(folder: Path, tensors: dict[str, torch.Tensor], *, no_dist: bool = False) -> None:
        read.append(len(tensors))
        files.read_tensors(folder, tensors, no_dist=no_dist)

    monkeypatch.setattr(merge, "read_tensors", count)
    assert merged(job, tmp_path / "out", "--last", 3) == 0
    assert set(read) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --last K or --steps N N ..."),
        (["--last", 2, "--steps", 2], "give either --last K or --steps N N ..."),
        (["--last", 4], "--last 4: {job} has checkpoints of the steps 2, 4, 6"),
        (["--last", -1], "--last -1: {job} has"),
        (["--steps", 2, 3, 5], "--steps 3 5: {job} has checkpoints of the steps 2, 4, 6"),
        (["--steps", 2, 2], "--steps 2 2: names a step twice"),
    ],
)
def test_what_cannot_be_merged_is_said(arguments, message: str, job: Path, tmp_path: Path, capsys) -> None:
    assert merged(job, tmp_path / "out", *arguments) == 2
    assert message.format(job=job) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_match_are_refused(job: Path, tmp_path: Path, capsys) -> None:
    def mixed(name: str, *settings: object) -> Path:
        """A folder with step 1 of a job with other settings, and step 6 of the job."""
        trainer(tmp_path / name, "--training.steps", 1, *settings).train()
        shutil.copytree(job / "checkpoint/step-6", tmp_path / name / "checkpoint/step-6")
        return tmp_path / name

    def refusal(folder: Path, *arguments: object) -> str:
        assert merged(folder, tmp_path / "out", "--last", 2, *arguments) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "step-1 cannot be averaged with" in refusal(mixed("gates", "--model.peer.gates", "relu"))
    assert "model.peer.gates = " in refusal(tmp_path / "gates")
    assert "other shapes; model.dim = 64 (was 32)" in refusal(mixed("narrow", "--model.dim", 32))
    assert "another tokenizer" in refusal(mixed("bytes", "--model.tokenizer_path", "byte", "--model.vocab_size", 4096))
    assert "step-1: holds no averaged weights" in refusal(tmp_path / "gates", "--ema")
    assert "is one checkpoint; give a job's folder" in refusal(job / "checkpoint/step-6")
    assert "does not exist" in refusal(tmp_path / "nothing")
    damaged = Path(shutil.copytree(job, tmp_path / "damaged"))
    flip_a_bit(next((damaged / "checkpoint/step-4").glob("*_model_*.distcp")))
    assert "step-4: the checkpoint is damaged: " in refusal(damaged)


def test_a_merge_that_fails_leaves_nothing_that_looks_like_a_checkpoint(
    job: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("titan_peer.checkpoint.saving._finish_own_files", full)
    assert merged(job, tmp_path / "out", "--last", 2) == 2
    assert "out: the merged checkpoint cannot be written: " in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
