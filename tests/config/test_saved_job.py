"""Checkpoints of earlier versions open and resume: `golden/checkpoint_version_0` was saved before configs had a
version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from titan_peer.checkpoint.files import manifest_entries, write_manifest
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.errors import UserError
from titan_peer.config.parse import job_from_table, load_config
from titan_peer.config.saved_job import read_saved_job
from titan_peer.config.version import CONFIG_VERSION, KEY, migrated, rename
from titan_peer.distributed.world import init_world
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/checkpoint_version_0"


@pytest.fixture(autouse=True)
def from_the_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "step-2", tmp_path / "checkpoint/step-2"))


def edited(checkpoint: Path, *replacements: tuple[str, str]) -> Path:
    """The checkpoint with changes in its config.toml, and a matching manifest."""
    text = (checkpoint / "config.toml").read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    (checkpoint / "config.toml").write_text(text, encoding="utf-8")
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    write_manifest(checkpoint, manifest_entries(checkpoint, files))
    return checkpoint


def require_golden_logits(checkpoint: Path) -> None:
    """The values that the version that saved it computed."""
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["logits"]
    for mmap_tables in (False, True):
        model = load_model_for_inference(checkpoint, mmap_tables=mmap_tables)[0]
        with torch.no_grad():
            logits = model(torch.arange(48).view(2, 24))[:, -1, ::8]
        torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_the_first_format_opens_with_the_logits_it_had():
    require_golden_logits(GOLDEN / "step-2")


def test_a_checkpoint_of_the_first_format_resumes_with_all_its_state(copy):
    """The losses continue as in the version that saved it; the learning-rate schedule may have changed since then."""
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["losses"]
    settings = ["--job.config_file", str(GOLDEN / "small.toml"), "--job.dump_folder", str(copy.parent.parent)]
    config = load_config([*settings, "--model.tokenizer_path", str(copy / "tokenizer")])
    job = Trainer(config, init_world(config.parallelism))
    assert (job.step, job.tokens_seen, job.loader.sequences_seen) == (2, 256, 4)
    assert all(state.any() for name, state in job.optimizers.named_state() if name.endswith("exp_avg_sq"))
    assert job.train() == 0
    lines = (copy.parent.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    assert losses == pytest.approx({int(step): loss for step, loss in expected.items()}, rel=1e-3)


def test_inference_opens_a_checkpoint_with_keys_it_does_not_know_and_says_so(copy, caplog):
    edited(
        copy,
        ("[metrics]\n", '[metrics]\nsend_pigeons = "daily"\n'),
        ('name = "sample text"\n', 'name = "sample text"\nlanguage = "en"\n'),
        ("[profiling]\n", "[astrology]\nsign = 3\n\n[profiling]\n"),
        ('async_mode = "disabled"', 'async_mode = "telepathic"'),
        ("steps = 4\n", 'steps = "four"\n'),
    )
    require_golden_logits(copy)
    (line,) = [r.message for r in caplog.records if r.name == "titan_peer" and "config.toml" in r.message]
    for key in (
        "metrics.send_pigeons",
        "data.sources[0].language",
        "astrology",
        "checkpoint.async_mode",
        "training.steps",
    ):
        assert key in line
    job = read_saved_job(copy / "config.toml")
    assert job.data.sources[0].path == "assets/sample_text/train.jsonl" and job.training.seq_len == 64


def test_a_model_with_keys_that_are_not_known_is_refused(copy):
    """These keys determine what the weights mean."""
    edited(copy, ("[model]\n", "[model]\nhyperbolic = true\n"))
    with pytest.raises(UserError, match=r"unknown key model\.hyperbolic"):
        load_model_for_inference(copy)


def test_weights_of_another_model_than_the_config_says_are_refused(copy):
    """Both cases: too few experts, and too many."""
    edited(copy, ("n_layers = 2", "n_layers = 3"))
    with pytest.raises(UserError, match=r"layers.2.attention_norm.weight: .*the checkpoint has nothing"):
        load_model_for_inference(copy)
    edited(copy, ("n_layers = 3", "n_layers = 1"))
    with pytest.raises(UserError, match=r"layers.1.attention.kv_norm.weight: .* the job has no such tensor"):
        load_model_for_inference(copy)


# ---- versions


def test_a_saved_job_carries_its_version_and_is_a_job_again(tmp_path):
    file = tmp_path / "config.toml"
    job = load_config(["--job.config_file", str(GOLDEN / "small.toml")])
    file.write_text(job.to_toml(), encoding="utf-8")
    assert f"{KEY} = {CONFIG_VERSION}\n" in job.to_toml()
    again = load_config(["--job.config_file", str(file)])
    again.job.config_file = job.job.config_file
    assert again == job and read_saved_job(file) == job


def test_tables_of_earlier_versions_are_migrated_step_by_step():
    old = {"training": {"iterations": 7, "seq_len": 64}, "telemetry": {"every": 3}}
    steps = {
        0: lambda table: rename(table, "training.iterations", "training.steps"),
        2: lambda table: rename(table, "telemetry.every", "metrics.log_freq"),
    }
    new = migrated(old, "file", unversioned=0, current=3, migrations=steps)
    assert new == {"training": {"steps": 7, "seq_len": 64}, "metrics": {"log_freq": 3}}
    assert old["training"] == {"iterations": 7, "seq_len": 64}
    # a file with a version is migrated from that version on
    assert migrated({KEY: 1, **old}, "file", unversioned=0, current=3, migrations=steps)["training"] == old["training"]
    assert migrated(old, "file", current=3, migrations=steps, unversioned=3) == old
    rename(new, "nowhere.at_all", "training.steps")
    assert new["training"]["steps"] == 7
    for wrong in (-1, "1", True, 1.0):
        with pytest.raises(UserError, match=f"{KEY} = .*: must be a whole number"):
            migrated({KEY: wrong}, "file")


def test_a_job_of_version_1_keeps_the_rates_of_its_expert_tables_and_what_missed_steps_did():
    old = {KEY: 1, "optimizer": {"expert_lr_factor": 2.0, "expert_weight_decay": 0.3, "lr": 0.5}}
    optimizer = job_from_table(migrated(old, "a job"), "a job").optimizer
    tables = optimizer.group("expert_tables")
    assert (tables.lr_factor, tables.weight_decay, optimizer.lr) == (2.0, 0.3, 0.5)
    assert not optimizer.expert_catch_up and not optimizer.problems()
    dense = job_from_table(migrated({KEY: 1, "optimizer": {"expert_update": "dense"}}, "a job"), "a job").optimizer
    assert not dense.problems()


def test_a_checkpoint_of_a_newer_version_opens_if_its_model_is_known(copy, caplog):
    text = (copy / "config.toml").read_text(encoding="utf-8")
    (copy / "config.toml").write_text(f"{KEY} = 99\nnew_section = {{ key = 1 }}\n{text}", encoding="utf-8")
    edited(copy)
    require_golden_logits(copy)
    assert any("newer version, config_version 99" in r.message and "new_section" in r.message for r in caplog.records)


def test_a_job_that_somebody_writes_is_of_this_version(tmp_path):
    """Only saved jobs are migrated: a misspelt key in a new file is an error."""
    file = tmp_path / "job.toml"
    file.write_text('[[data.sources]]\npath = "x"\n[training]\nstepps = 3\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown key training.stepps = 3; did you mean steps"):
        load_config(["--job.config_file", str(file)])
