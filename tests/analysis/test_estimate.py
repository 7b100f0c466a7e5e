"""The memory estimate compared with the memory that a run measures, and the command that prints the estimate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_peer.analysis.estimate import estimate_memory
from titan_peer.commands import main as cli
from titan_peer.config.parse import load_config

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU run's resident set")


def estimated_and_measured(folder: Path, job: str, *arguments: str, processes: int = 1) -> tuple[float, float]:
    """GiB per process: the estimate, and the peak that the run reports."""
    settings = ["--job.config_file", f"{ROOT}/train_configs/{job}.toml", "--job.dump_folder", str(folder), *arguments]
    settings += ["--model.tokenizer_path", str(ROOT / "assets/tokenizer")]
    done = subprocess.run(
        ["./run_train.sh", *settings],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "NGPU": str(processes)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    estimate = estimate_memory(load_config(settings), processes)
    return estimate.total / 2**30, max(r["peak_memory_gib"] for r in records if "peak_memory_gib" in r)


@on_cpu
@pytest.mark.parametrize("processes", [1, 2])
def test_estimate_is_within_fifteen_per_cent_of_what_the_run_measures(tmp_path: Path, processes: int) -> None:
    arguments = ["--training.steps", "3", "--compile.enable", "false", "--checkpoint.enable", "false"]
    if processes > 1:
        arguments += ["--training.local_batch_size", "4", "--parallelism.expert_parallel_degree", "2"]
    estimated, measured = estimated_and_measured(tmp_path, "debug_model", *arguments, processes=processes)
    assert estimated == pytest.approx(measured, rel=0.15)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("debug_model", []),
        ("debug_model", ["--training.local_batch_size", "24", "--compile.enable", "false"]),
        ("debug_model", ["--activation_checkpoint.mode", "full", "--training.local_batch_size", "24"]),
        ("debug_model", ["--optimizer.expert_update", "dense"]),
        ("peer_small", []),
        ("peer_1m", ["--training.local_batch_size", "1", "--training.seq_len", "256"]),  # 9.5 GiB
    ],
)
def test_jobs_as_they_are_stay_within_fifteen_per_cent(tmp_path: Path, job: str, arguments: list[str]) -> None:
    arguments = [*arguments, "--training.steps", "3", "--validation.enable", "false", "--checkpoint.enable", "false"]
    estimated, measured = estimated_and_measured(tmp_path, job, *arguments)
    assert estimated == pytest.approx(measured, rel=0.15)


def test_command_prints_what_the_function_returns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    job = ["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false"]
    job += ["--parallelism.expert_parallel_degree", "4"]
    estimate = estimate_memory(load_config(job), 4)
    assert cli.main(["estimate", *job, "--world-size", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**estimate.rows(), "total": estimate.total}
    assert cli.main(["estimate", *job, "--world-size", "6"]) == 2
    assert "parallelism.expert_parallel_degree = 4: must divide" in capsys.readouterr().err


def test_command_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = ["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false"]
    assert cli.main(["estimate", *job, "--training.seq_len", "32", "--checkpoint.async_mode", "async"]) == 0
    rows = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert rows["parameters"] == "108.4 MiB" and rows["checkpoint copy"] == "321.9 MiB"
    assert "most at a time" in rows


def test_the_state_of_expert_tables_is_counted_by_their_optimizer() -> None:
    arguments = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable", "false"]
    arguments += ["--model.tokenizer_path", str(ROOT / "assets/tokenizer"), "--training.local_batch_size", "1"]
    normalized = ["--optimizer.expert_optimizer", "normalized"]
    adamw, momentum, none = (
        estimate_memory(load_config([*arguments, *more]), 1).by_kind["moments"]
        for more in ([], normalized, [*normalized, "--optimizer.expert_momentum", "0"])
    )
    rows = 3 * 2 * 16384
    assert adamw - momentum == rows * 256 * 4
    assert momentum - none == rows * (256 * 4 + 4)


def test_dense_update_of_the_tables_takes_gradients_of_their_size() -> None:
    arguments = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable", "false"]
    arguments += ["--model.tokenizer_path", str(ROOT / "assets/tokenizer"), "--training.local_batch_size", "1"]
    tables = 3 * 2 * 16384 * 256 * 4
    assert estimate_memory(load_config(arguments), 1).by_kind["gradients"] < 0.2 * tables
    dense = estimate_memory(load_config([*arguments, "--optimizer.expert_update", "dense"]), 1)
    assert dense.by_kind["gradients"] > tables
