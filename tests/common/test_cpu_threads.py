"""How OpenMP's threads wait, as OpenMP reports when it is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
JOB = ["--job.config_file", "train_configs/debug_model.toml"]
STARTS = {
    "titan-peer": ([sys.executable, "-m", "titan_peer.commands.main", "tune", *JOB], 2),  # without a GPU
    "run_train.sh": (["./run_train.sh", *JOB, "--comm.mode", "fake_backend"], 0),
}
"""Short commands that load torch, and their exit status."""


def spins(start: str, **settings: str) -> int:
    """How often a waiting thread spins before it sleeps, in the process that has loaded torch."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_DISPLAY_ENV": "VERBOSE"}
    command, status = STARTS[start]
    done = subprocess.run(
        command,
        env={**environment, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
    )
    assert done.returncode == status, done.stderr
    found = re.search(r"GOMP_SPINCOUNT *= *'(\d+)'", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is PyTorch's on Linux")
@pytest.mark.parametrize("start", STARTS)
def test_threads_that_wait_sleep_unless_the_user_has_set_how_they_wait(start: str) -> None:
    assert spins(start) == 0
    assert spins(start, GOMP_SPINCOUNT="5") == 5


def test_another_setting_of_how_threads_wait_is_the_users_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_peer.common.cpu_threads import let_waiting_threads_sleep

    for name in WAITING:
        for other in WAITING:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, "7")
        let_waiting_threads_sleep()
        assert {other: os.environ.get(other) for other in WAITING} == {**dict.fromkeys(WAITING), name: "7"}
