"""Every command accepts a checkpoint, a folder of checkpoints or a job's folder, and says which checkpoint it uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.commands import main as cli
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/checkpoint_version_0"


@pytest.fixture
def job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's folder with checkpoints of the steps 2, 4 and 10, and with later unfinished ones."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "job"
    for step in (2, 4, 10):
        shutil.copytree(GOLDEN / "step-2", folder / f"checkpoint/step-{step}")
    for name in ("step-12.damaged", "step-14.superseded", ".step-16.partial"):
        shutil.copytree(GOLDEN / "step-2", folder / "checkpoint" / name)
    shutil.copytree(GOLDEN / "step-2", folder / "checkpoint/step-18")
    (folder / "checkpoint/step-18/manifest.json").unlink()
    return folder


def test_the_newest_complete_checkpoint_of_a_job_or_of_a_folder_is_taken_and_named(job_folder, caplog):
    caplog.set_level("INFO", logger="titan_peer")
    newest = job_folder / "checkpoint/step-10"
    assert find_checkpoint(job_folder, "--checkpoint") == newest
    assert find_checkpoint(str(job_folder / "checkpoint"), "--checkpoint") == newest
    assert [str(newest) in record.message for record in caplog.records] == [True, True]
    caplog.clear()
    assert find_checkpoint(job_folder / "checkpoint/step-4", "--checkpoint") == job_folder / "checkpoint/step-4"
    assert not caplog.records  # nothing was chosen


def test_a_job_with_another_name_for_its_folder_of_checkpoints_is_understood(job_folder):
    (job_folder / "checkpoint").rename(job_folder / "saved")
    (job_folder / "config.toml").write_text('[checkpoint]\nfolder = "saved"\n', encoding="utf-8")
    assert find_checkpoint(job_folder, "--checkpoint") == job_folder / "saved/step-10"


def test_an_exported_model_is_told_from_a_checkpoint(job_folder):
    export = job_folder / "checkpoint/step-4"
    (export / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"--checkpoint .*step-4: is an exported model \(titan-peer import"):
        find_checkpoint(export, "--checkpoint")


def test_every_command_takes_a_jobs_folder(job_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="titan_peer")
    text = "assets/sample_text/validation.jsonl"
    calls = {
        "generate": ["--prompt", "In", "--max-new-tokens", "2", "--device", "cpu"],
        "experts": ["--data", text, "--tokens", "500", "--output-dir", str(tmp_path / "experts"), "--device", "cpu"],
        "eval": ["--perplexity", text, "--output", str(tmp_path / "eval"), "--device", "cpu"],
        "export": ["--output", str(tmp_path / "export")],
    }
    newest = job_folder / "checkpoint/step-10"
    state = json.loads((newest / "train_state.json").read_text(encoding="utf-8"))
    (newest / "train_state.json").write_text(json.dumps(state | {"step": 10}), encoding="utf-8")
    _sign(newest)
    for command, arguments in calls.items():
        assert cli.main([command, "--checkpoint", str(job_folder), *arguments]) == 0, command
        assert f"{job_folder}: its newest checkpoint is {newest}" in [r.message for r in caplog.records], command
        caplog.clear()
    assert json.loads((tmp_path / "export/train_state.json").read_text(encoding="utf-8"))["step"] == 10
    assert json.loads((tmp_path / "eval/results.json").read_text(encoding="utf-8"))["checkpoint"] == str(newest)
    records = (tmp_path / "experts/expert_usage.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(records[0])["step"] == 10


def _sign(checkpoint: Path) -> None:
    """Write a new manifest for files that a test has changed."""
    from titan_peer.checkpoint.files import manifest_entries, write_manifest

    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    write_manifest(checkpoint, manifest_entries(checkpoint, files))


def test_a_job_starts_from_another_jobs_folder(job_folder, tmp_path):
    settings = ["--job.config_file", str(GOLDEN / "small.toml"), "--job.dump_folder", str(tmp_path / "new")]
    settings += ["--model.tokenizer_path", str(GOLDEN / "step-2/tokenizer")]
    config = load_config([*settings, "--checkpoint.initial_load_path", str(job_folder)])
    started = Trainer(config, init_world(config.parallelism)).model.state_dict()["norm.weight"]
    config = load_config([*settings, "--checkpoint.initial_load_path", str(job_folder / "checkpoint/step-10")])
    assert started.equal(Trainer(config, init_world(config.parallelism)).model.state_dict()["norm.weight"])
    config = load_config([*settings, "--checkpoint.initial_load_path", str(tmp_path / "new")])
    with pytest.raises(UserError, match=r"checkpoint.initial_load_path = .*has no complete checkpoint in it"):
        Trainer(config, init_world(config.parallelism))
