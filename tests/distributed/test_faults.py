"""Faults of long runs, with real jobs of two processes: processes killed, stopped or signalled, and a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from small_jobs import SMALL, tensors_of
from test_train import ROOT, records
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from titan_peer.checkpoint.files import verify
from titan_peer.checkpoint.folder import saved_steps
from titan_peer.distributed.agent import first_failure

JOB = [*SMALL, "--checkpoint.interval", 2, "--checkpoint.async_mode", "async", "--lr_scheduler.warmup_steps", 4]


@dataclass
class Running:
    """A job of two processes in its folder, with its output in a file."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")

    def worker(self, rank: int) -> psutil.Process | None:
        for child in psutil.Process(self.process.pid).children():
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    def until(self, happened: Callable[[], bool], what: str, seconds: float = 400, pause: float = 0.02) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"not seen: {what}\n{self.said}"
            time.sleep(pause)

    def until_step(self, step: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        self.until(lambda: metrics.exists() and max(records(self.folder), default=0) >= step, f"step {step}")

    @property
    def newest(self) -> int:
        return max(saved_steps(self.folder / "checkpoint"), default=0)

    @property
    def is_saving(self) -> bool:
        return any((self.folder / "checkpoint").glob(".step-*.partial-*"))

    def ends(self, seconds: float = 400) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start():
    """Start a job in a folder; if it is still running at the end of the test, it is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, *arguments: object, **environment: str) -> Running:
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["./run_train.sh", *map(str, [*JOB, "--job.dump_folder", folder, *arguments])],
                cwd=ROOT,
                env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "NGPU": "2", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return Running(process, folder)

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def kill_at_random(job: Running, kills: int, seed: int) -> int:
    """Kill one of the two ranks `kills` times, each time after a new checkpoint; returns how many kills happened during
    a save."""
    choice = random.Random(seed)
    during_save = 0
    for i in range(kills):
        before = job.newest
        job.until(lambda: job.newest > before and job.worker(0) is not None, f"a checkpoint after kill {i}")  # noqa: B023
        if choice.random() < 0.5:
            job.until(lambda: job.is_saving, "a save", pause=0.001)
            time.sleep(choice.uniform(0, 0.2))
        else:
            time.sleep(choice.uniform(0, 0.5))
        victim = job.worker(choice.randrange(2))
        assert victim is not None, f"the job ended before kill {i}:\n{job.said}"
        during_save += job.is_saving
        victim.kill()
    return during_save


def check_restarts(start: Callable[..., Running], tmp_path: Path, kills: int, seed: int) -> int:
    steps = ["--training.steps", 6 + 8 * kills]
    straight = start(tmp_path / "straight", *steps)
    assert straight.ends() == 0, straight.said
    job = start(tmp_path / "killed", *steps, MAX_RESTARTS=str(kills))
    during_save = kill_at_random(job, kills, seed)
    assert job.ends() == 0, job.said
    assert job.said.count("failed first (signal 9") == kills
    assert f"restart {kills} of {kills} from the newest checkpoint" in job.said
    assert records(job.folder) == records(straight.folder)
    checkpoints = job.folder / "checkpoint"
    assert not list(checkpoints.glob(".*")) and not list(checkpoints.glob("*.damaged"))
    assert "is damaged" not in job.said
    for step in saved_steps(checkpoints):
        verify(checkpoints / f"step-{step}")
        found = tensors_of(checkpoints / f"step-{step}")
        expected = tensors_of(straight.folder / "checkpoint" / f"step-{step}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), step
    return during_save


def test_killed_ranks_restart_and_end_with_the_losses_of_an_uninterrupted_run(start, tmp_path):
    check_restarts(start, tmp_path, kills=2, seed=1)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_no_trace(start, tmp_path):
    during_save = check_restarts(start, tmp_path, kills=20, seed=2)
    assert during_save >= 3


def test_a_lost_rank_ends_the_job_within_a_minute_and_is_named(start, tmp_path):
    job = start(tmp_path, "--training.steps", 100_000)
    job.until_step(3)
    victim = job.worker(1)
    assert victim is not None
    victim.kill()
    begin = time.monotonic()
    assert job.ends() == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 60
    assert f"error: rank 1 failed first (signal 9, process {victim.pid})" in job.said


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_after_the_timeout_and_is_named(start, tmp_path):
    job = start(tmp_path, "--training.steps", 100_000, "--parallelism.timeout_seconds", 10)
    job.until_step(3)
    victim = job.worker(1)
    assert victim is not None
    victim.suspend()
    begin = time.monotonic()
    assert job.ends(100) == 1
    assert time.monotonic() - begin < 90
    assert "no sign of life from rank 1" in job.said


@pytest.mark.parametrize(
    ("statuses", "first"),
    [
        ({0: (1, 100), 1: (-9, 99)}, 1),  # rank 1 was killed, rank 0 lost contact
        ({0: (1, 100), 1: (-9, 101)}, 1),  # the same, detected in the other order
        ({0: (1, 100), 1: (-9, 131)}, 0),  # rank 1 hung, and finally torchrun killed it
        ({0: (-15, 99), 1: (1, 100), 2: (1, 98)}, 2),
    ],
)
def test_the_failure_that_led_to_the_others_is_found(statuses, first, tmp_path):
    failures = {}
    for rank, (exitcode, timestamp) in statuses.items():
        failures[rank] = ProcessFailure(rank, 1000 + rank, exitcode, str(tmp_path / "none"))
        failures[rank].timestamp = timestamp
    assert first_failure(failures)[0] == first


@pytest.mark.parametrize("told", ["rank 1", "the launcher", "everyone"])
def test_sigterm_leads_to_one_common_checkpoint_and_status_zero(start, tmp_path, told):
    job = start(tmp_path, "--training.steps", 100_000, "--checkpoint.keep_latest_k", 0)
    job.until_step(3)
    launcher, workers = psutil.Process(job.process.pid), [job.worker(0), job.worker(1)]
    assert all(workers)
    # a scheduler signals every process of a job, and the launcher passes it on: workers get it twice
    for target in {"rank 1": workers[1:], "the launcher": [launcher], "everyone": [*workers, launcher]}[told]:
        target.send_signal(signal.SIGTERM)
    assert job.ends() == 0, job.said
    last = max(records(tmp_path))
    assert job.newest == last
    verify(tmp_path / "checkpoint" / f"step-{last}")
    assert not list((tmp_path / "checkpoint").glob(".*"))
    assert "the same command resumes" in job.said


def test_bad_input_is_not_tried_again(start, tmp_path):
    job = start(tmp_path, "--data.sources.0.path", "no/such/file.jsonl", MAX_RESTARTS="3")
    assert job.ends() == 2
    assert job.said.count("data.sources[0].path = no/such/file.jsonl") == 1


def test_the_first_process_says_why_and_exits_though_the_launcher_is_ending_it():
    """Otherwise the launcher, which sees a process ended by its own SIGTERM, would print the same message again."""
    program = (
        "import os, signal, sys\n"
        "from titan_peer.common.errors import UserError\n"
        "from titan_peer.failures import exit_status\n"
        "status = exit_status(UserError('no such file'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(status)\n"
    )
    launched = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "one"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=launched, capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: no such file\n")


def test_a_loss_that_is_not_finite_is_not_tried_again(start, tmp_path):
    job = start(tmp_path, "--optimizer.lr", "1e30", "--training.max_norm", 0, MAX_RESTARTS="3")
    assert job.ends() == 3, job.said
    assert "gradient norm = " in job.said and "restart 1 of 3" not in job.said
    assert job.said.count("steps 1 to ") == 1


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_training_goes_on(start, tmp_path):
    job = start(tmp_path, "--training.steps", 100_000, "--checkpoint.keep_latest_k", 0)
    job.until(lambda: job.newest >= 2, "a checkpoint")
    writer = job.worker(1)
    assert writer is not None
    limit = writer.rlimit(resource.RLIMIT_FSIZE)
    writer.rlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # no larger file can be written
    job.until(lambda: job.said.count("could not be written: rank 1: ") >= 2, "two failed saves")
    sound = saved_steps(tmp_path / "checkpoint")
    writer.rlimit(resource.RLIMIT_FSIZE, limit)
    job.until(lambda: job.newest > sound[-1], "a checkpoint with space again")
    os.kill(writer.pid, signal.SIGTERM)
    assert job.ends() == 0, job.said
    for step in saved_steps(tmp_path / "checkpoint"):
        verify(tmp_path / "checkpoint" / f"step-{step}")
    assert sound == [step for step in saved_steps(tmp_path / "checkpoint") if step <= sound[-1]]
