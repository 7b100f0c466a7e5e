"""Helpers of the tests of evaluations."""

from __future__ import annotations

import subprocess
from pathlib import Path

import warm_processes

ROOT = Path(__file__).resolve().parents[2]
VALIDATION = ROOT / "assets/sample_text/validation.jsonl"
# The debug model with smaller batches in float32: these tests do not depend on how well it learns.
QUICK = ["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false"]
QUICK += ["--training.local_batch_size", "2", "--training.mixed_precision_param", "float32"]
QUICK += ["--validation.enable", "false", "--metrics.log_freq", "1"]


def titan_peer(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in the repository; fails unless it ends with `status`."""
    done = warm_processes.run(warm_processes.TITAN_PEER, *arguments)
    assert done.returncode == status, done.stderr
    return done
