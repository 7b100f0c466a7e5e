"""Jobs with training.ema_decay: the average is that of the weights after each step, and the training does not notice."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from small_jobs import SMALL, tensors_of, trainer
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.commands import main as cli
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.metrics.held_out_loss import held_out_loss
from titan_peer.optim.weight_average import WeightAverage
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
DECAY = 0.7
AVERAGED = ["--training.ema_decay", DECAY, "--lr_scheduler.warmup_steps", 0]
VALIDATED = ["--validation.enable", "true", "--validation.freq", 2, "--validation.steps", 2]


@pytest.fixture(scope="module", autouse=True)
def from_the_repository_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def whole_weights(job: Trainer) -> dict[str, Tensor]:
    state = get_model_state_dict(job.model)
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def noting(job: Trainer) -> list[dict[str, Tensor]]:
    """The whole weights after each step, as they come."""
    seen: list[dict[str, Tensor]] = []
    require = job._require_good

    def note(result: Any) -> None:
        require(result)
        seen.append(whole_weights(job))

    job._require_good = note  # type: ignore[method-assign]
    return seen


def average_of(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Step by step in float64, each step with the decay that makes all shares sum to one."""
    average = {name: tensor.double() for name, tensor in seen[0].items()}
    for t, weights in enumerate(seen[1:], start=2):
        new = (1 - DECAY) / (1 - DECAY**t)
        average = {name: a + new * (weights[name].double() - a) for name, a in average.items()}
    return average


def records(folder: Path, key: str) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[dict[str, Tensor]]]:
    job = trainer(tmp_path_factory.mktemp("averaged"), *AVERAGED, *VALIDATED)
    seen = noting(job)
    assert job.train() == 0
    return job, seen


def test_checkpoints_hold_the_average_of_the_weights_after_each_step(averaged) -> None:
    job, seen = averaged
    for step in (2, 4, 6):
        saved = tensors_of(job.checkpointer.folder / f"step-{step}")
        assert saved["ema_updates"] == step
        for name, expected in average_of(seen[:step]).items():
            torch.testing.assert_close(saved[f"ema.{name}"].double(), expected, rtol=1e-6, atol=1e-7, msg=name)


def test_the_training_is_the_same_without_it(averaged, tmp_path: Path) -> None:
    job, _ = averaged
    plain = trainer(tmp_path, *AVERAGED[2:])
    plain.train()
    assert records(tmp_path, "loss") == records(job.dump_folder, "loss")
    saved, ours = tensors_of(tmp_path / "checkpoint/step-6"), tensors_of(job.checkpointer.folder / "step-6")
    assert saved.keys() == {name for name in ours if not name.startswith("ema")}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in saved.items())


def test_validation_measures_the_model_that_ema_opens(averaged) -> None:
    job, _ = averaged
    found = records(job.dump_folder, "validation_ema_loss")
    assert set(found) == {2, 4, 6} and found[6] != records(job.dump_folder, "validation_loss")[6]
    model = load_model_for_inference(job.checkpointer.folder / "step-6", ema=True)[0]
    keys = ("tokens", "document_ids", "labels")
    (batches,) = job.validation_loader.sets.values()
    loss = held_out_loss(lambda batch: model(*(batch[key] for key in keys)), batches, max_batches=2)
    assert loss.loss == pytest.approx(found[6], rel=1e-6)


def test_a_resumed_average_goes_on_to_the_last_bit(averaged, tmp_path: Path) -> None:
    job, _ = averaged
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/step-2").symlink_to(job.checkpointer.folder / "step-2")
    resumed = trainer(tmp_path, *AVERAGED, *VALIDATED)
    assert resumed.step == 2 and resumed.train() == 0
    ours, theirs = tensors_of(tmp_path / "checkpoint/step-6"), tensors_of(job.checkpointer.folder / "step-6")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert records(tmp_path, "validation_ema_loss")[6] == records(job.dump_folder, "validation_ema_loss")[6]


def test_a_checkpoint_without_an_average_starts_one_and_says_so(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="titan_peer")
    trainer(tmp_path, "--training.steps", 2).train()
    with pytest.raises(UserError, match=r"holds no averaged weights; a job with training\.ema_decay saves them"):
        load_model_for_inference(tmp_path / "checkpoint/step-2", ema=True)
    resumed = trainer(tmp_path, *AVERAGED, "--training.steps", 4)
    assert "the average of the weights starts anew, since none is loaded" in caplog.text
    seen = noting(resumed)
    resumed.train()
    saved = tensors_of(tmp_path / "checkpoint/step-4")
    for name, expected in average_of(seen).items():
        torch.testing.assert_close(saved[f"ema.{name}"].double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    without = trainer(tmp_path, "--training.steps", 6)  # and an average that the job does not want is no obstacle
    assert without.step == 4 and without.train() == 0


def test_an_average_of_other_tensors_is_not_continued(averaged, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="titan_peer")
    job, _ = averaged
    start = ["--checkpoint.initial_load_path", job.checkpointer.folder / "step-2", "--training.steps", 6]
    start += ["--checkpoint.initial_load_model_only", "false", "--checkpoint.exclude_from_loading", "model.output.*"]
    other = trainer(tmp_path, *AVERAGED, *start)
    assert int(other.optimizers.average.updates) == 0 and "starts anew" in caplog.text


def test_a_skipped_step_is_not_in_the_average(tmp_path: Path) -> None:
    job = trainer(tmp_path, *AVERAGED, "--training.skip_bad_steps", 1)
    job.model.output.weight.register_hook(lambda gradient: gradient * torch.nan if job.step == 3 else gradient)
    seen = noting(job)
    job.train()
    saved = tensors_of(tmp_path / "checkpoint/step-6")
    assert saved["ema_updates"] == 5
    for name, expected in average_of(seen[:2] + seen[3:]).items():
        torch.testing.assert_close(saved[f"ema.{name}"].double(), expected, rtol=1e-6, atol=1e-7, msg=name)


def test_a_model_only_checkpoint_holds_the_average_too_and_export_takes_it(tmp_path: Path, capsys) -> None:
    from safetensors.torch import load_file

    last = ["--checkpoint.last_save_model_only", "true", "--checkpoint.export_dtype", "bfloat16"]
    job = trainer(tmp_path / "job", *AVERAGED, *last, "--training.steps", 3)
    seen = noting(job)
    job.train()
    arguments = ["export", "--checkpoint", str(tmp_path / "job"), "--output", str(tmp_path / "export"), "--ema"]
    assert cli.main(arguments) == 0
    exported, expected = load_file(tmp_path / "export/model.safetensors"), average_of(seen)
    for name, tensor in exported.items():
        is_buffer = "running" in name
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6 if is_buffer else 2**-8, atol=1e-7)
    assert cli.main(["eval", "--checkpoint", "x", "--ema", "--register_with_oaieval"]) == 2
    assert "--ema: does not go with --register_with_oaieval" in capsys.readouterr().err


def test_validation_of_the_average_after_the_last_data_waits_for_the_save_that_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, swap, swapped = StateDictStager.stage, WeightAverage.swap_with_weights, threading.Event()

    def stage_when_swapped(self, state_dict, **kwargs):
        swapped.wait(0.2)
        return stage(self, state_dict, **kwargs)

    monkeypatch.setattr(StateDictStager, "stage", stage_when_swapped)
    monkeypatch.setattr(WeightAverage, "swap_with_weights", lambda self: (swap(self), swapped.set()))
    text = "".join(json.dumps({"text": f"A short document, number {i}."}) + "\n" for i in range(40))
    (tmp_path / "few.jsonl").write_text(text, encoding="utf-8")
    data = ["--data.sources.0.path", tmp_path / "few.jsonl", "--data.sources.0.max_epochs", 1]
    saves = ["--checkpoint.async_mode", "async", "--checkpoint.interval", 1, "--validation.freq", 1000]
    job = trainer(tmp_path, *AVERAGED, *VALIDATED[:2], *VALIDATED[4:], *data, *saves)
    job.train()
    assert 1 < job.step < 6 and job.step in records(tmp_path, "validation_ema_loss")
    saved = tensors_of(job.checkpointer.folder / f"step-{job.step}")
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in whole_weights(job).items())


def train_with_two(folder: str, parts: int) -> float:
    """A job on this process of two; returns the largest difference of its checkpoint's averages from brute force."""
    more = ["--training.local_batch_size", 1, "--parallelism.expert_parallel_degree", parts]
    more += [*AVERAGED, *VALIDATED, "--training.steps", 4, "--job.dump_folder", folder]
    config = load_config([*SMALL, *map(str, more)])
    job = Trainer(config, init_world(config.parallelism))
    seen = noting(job)
    job.train()
    saved = tensors_of(job.checkpointer.folder / "step-4")
    return max((saved[f"ema.{n}"].double() - a).abs().max().item() for n, a in average_of(seen).items())


def train_both_with_two(folder: str) -> list[float]:
    found = []
    for parts in (1, 2):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + parts)
        found.append(train_with_two(f"{folder}/{parts}", parts))
        torch.distributed.destroy_process_group()
    return found


def test_two_processes_average_their_shards_and_one_goes_on_with_them(tmp_path: Path) -> None:
    for differences in run_in_processes(2, train_both_with_two, str(tmp_path)):
        assert max(differences) < 1e-6
    for parts in ("1", "2"):
        raw, of_average = (records(tmp_path / parts, key) for key in ("validation_loss", "validation_ema_loss"))
        folder = tmp_path / parts / "checkpoint/step-4"
        one = trainer(tmp_path / f"on one, from {parts}", *AVERAGED, *VALIDATED)
        for ema, found in ((False, raw), (True, of_average)):
            model = load_model_for_inference(folder, ema=ema)[0]
            one.model.load_state_dict(model.state_dict())
            one.optimizers.refresh_copies()
            (batches,) = one.validation_loader.sets.values()
            # two processes had two batches each
            assert one.run.held_out_loss(batches, 4).loss == pytest.approx(found[4], rel=1e-5)
        resumed = trainer(tmp_path / parts, *AVERAGED)
        assert resumed.step == 4 and int(resumed.optimizers.average.updates) == 4
        saved = tensors_of(folder)
        for name, tensor in resumed.optimizers.average.named_tensors().items():
            assert torch.equal(tensor, saved[f"ema.{name}"]), name
