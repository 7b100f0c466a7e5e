"""Every benchmark runs, as small as its options allow. The test requires that it measures; the numbers mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL_JOB = ["--training.seq_len", "64", "--training.local_batch_size", "2", "--compile.enable", "false"]
SMALLEST = {
    "checkpoint": ["--experts", "1024", "--dim", "64", "--interval", "2", "--saves", "2", "--compile", "false"],
    "expert_update": ["--steps", "2", "--experts", "1024", "--dim", "64", "--batch_size", "2", "--seq_len", "64"],
    "expert_update_time": ["--steps", "2", "--experts", "1024", "--dim", "64", "--tokens", "64"],
    "expert_usage": ["--steps", "4", "--warmup", "1", "--", *SMALL_JOB],
    "peer_kernels": ["--experts", "1024", "--tokens", "64", "--dim", "32", "--repeats", "2", "--threads", "1"],
    "peer_layer": [
        "--experts",
        "1024",
        "--tokens",
        "64",
        "--dim",
        "32",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--warmup",
        "1",
    ],
}
CONTENDERS = ["--contenders", "titan_peer", "titan_peer_small_state"]  # the peers are an extra of their own


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_benchmark_runs(name, tmp_path):
    more = CONTENDERS if name == "peer_layer" else []
    command = [sys.executable, f"benchmarks/{name}.py", "--output", str(tmp_path), *more, *SMALLEST[name]]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (numbers,) = tmp_path.glob("*.json")
    assert json.loads(numbers.read_text(encoding="utf-8")) and list(tmp_path.glob("*.md"))
