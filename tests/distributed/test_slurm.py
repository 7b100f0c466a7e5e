"""multinode_trainer.slurm with imitations of SLURM's two commands on this machine: two launchers find each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames localhost,localhost2" ]] && printf 'localhost\\nlocalhost2\\n'
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


@pytest.mark.slow
def test_two_machines_train_one_job(tmp_path: Path) -> None:
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = ["--job.config_file", "train_configs/debug_model.toml", "--training.steps", "2", "--metrics.log_freq", "1"]
    job += ["--training.seq_len", "32", "--training.local_batch_size", "1", "--model.n_layers", "1"]
    job += ["--compile.enable", "false", "--validation.enable", "false", "--job.dump_folder", str(tmp_path / "out")]
    slurm = {
        "SLURM_JOB_NODELIST": "localhost,localhost2",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["./multinode_trainer.slurm", *job],
        cwd=ROOT,
        env={**os.environ, **slurm, "PATH": path, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "2 x CPU" in done.stderr
    records = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2]
    assert (tmp_path / "out" / "checkpoint" / "step-2").is_dir()
