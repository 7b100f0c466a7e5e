"""Train the runs of an ablation: several at a time on this machine, or as SLURM jobs. Finished runs are not repeated.

A run's folder holds job.toml (what to train), log.txt (the trainer's output), everything the trainer writes, and, after
the run has ended, status.json. A run that was interrupted has no status.json and continues from its checkpoint when
started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_peer.ablation.plan import Run
from titan_peer.checkpoint.compare import changed_settings, described
from titan_peer.common.errors import UserError
from titan_peer.config.saved_job import read_saved_job
from titan_peer.metrics.sinks import complete_lines

JOB, LOG, STATUS, CHECKPOINTS = "job.toml", "log.txt", "status.json", "checkpoint"


def folder_of(run: Run) -> Path:
    return Path(run.config.job.dump_folder)


def status_of(run: Run) -> dict[str, Any] | None:
    """How the run ended; None if it has not ended."""
    file = folder_of(run) / STATUS
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return found


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a kill or a crash at any moment leaves either the old text or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


@contextlib.contextmanager
def only_here(output_dir: Path) -> Iterator[None]:
    """Lock the folder against a second ablation.

    Raises:
        UserError: another ablation is working there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output_dir {output_dir}: another titan-peer ablate is working there") from None
        yield


def prepare(runs: Sequence[Run], *, resume: bool, retry_failed: bool, keep_checkpoints: bool = False) -> list[Run]:
    """Write the runs' jobs and return the runs that are still to do.

    Checkpoints of finished runs, which a killed ablation may have left, are removed unless they are to be kept.

    Raises:
        UserError: the folder has runs and `resume` is false, or it has a run of the same name with other settings.
    """
    started = [run for run in runs if (folder_of(run) / JOB).exists()]
    if started and not resume:
        raise UserError(
            f"--output_dir {folder_of(started[0]).parent.parent}: has {len(started)} of these runs already; "
            "give --resume to go on with them, or another folder"
        )
    to_do = []
    for run in runs:
        folder, job = folder_of(run), run.config.to_toml()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / JOB).exists():
            # compared by key, because an earlier version wrote the same job without newer keys
            changes = changed_settings(read_saved_job(folder / JOB), run.config)
            if changes:
                raise UserError(
                    f"{folder / JOB}: the run was started with other settings: this one has {described(changes)}; give another "
                    "--output_dir"
                )
        write_whole(folder / JOB, job)
        status = status_of(run)
        if status is None or (retry_failed and status["state"] == "failed"):
            to_do.append(run)
        elif status["state"] == "done" and not keep_checkpoints:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return to_do


def command(folder: Path, processes: int) -> list[str]:
    """The command that trains a run's job."""
    module = ["-m", "titan_peer.train", "--job.config_file", str(folder / JOB)]
    if processes == 1:
        return [sys.executable, *module]
    launcher = ["-m", "titan_peer.distributed.launch", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *module]


def _end_with_parent() -> None:
    """In the child process: make the kernel send SIGTERM (save and stop) when the parent process dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _start(folder: Path, processes: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / LOG).open("ab") as log, (folder / ".lock").open("w", encoding="utf-8") as lock:
        # The trainer inherits the lock until it ends, so a trainer that a killed ablation left behind can save first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.Popen(
            command(folder, processes),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches it through us, once
            preexec_fn=_end_with_parent,
        )


def record_end(
    folder: Path, steps: int, exit_status: int, seconds: float, keep_checkpoints: bool, beside: int = 0
) -> str:
    """Write status.json, unless the run was stopped before its end; returns "done", "failed" or "stopped".

    Args:
        beside: the largest number of other runs on the same cores during the run.
    """
    last = max((line["step"] for line in complete_lines(folder / "metrics.jsonl")), default=0)
    if exit_status == 0 and last < steps:
        return "stopped"
    state = "done" if exit_status == 0 else "failed"
    record: dict[str, Any] = {
        "state": state,
        "exit_status": exit_status,
        "seconds": round(seconds, 1),
        "beside": beside,
    }
    if state == "failed":
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        record["error"] = next((line for line in reversed(lines) if "error:" in line.lower()), "".join(lines[-1:]))
    write_whole(folder / STATUS, json.dumps(record))
    if state == "done" and not keep_checkpoints:  # only now, so that a kill before this leaves a resumable run
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return state


class StoppedError(Exception):
    """The ablation was told to stop; the runs have saved."""


@dataclass
class _Working:
    """A run that is being trained on this machine."""

    run: Run
    process: subprocess.Popen[bytes]
    slot: list[str]
    """Its GPUs."""
    began: float
    beside: int = 0
    """The largest number of other runs on the same cores so far."""


def run_here(
    runs: Sequence[Run],
    *,
    processes: int,
    jobs: int,
    gpus: Sequence[str],
    keep_checkpoints: bool,
    report: Callable[[str], None],
) -> None:
    """Train the runs on this machine, `jobs` at a time.

    Args:
        processes: per run.
        gpus: ids of the devices to distribute, `processes` per run; empty for the CPU.
        report: is called with a line for each run that starts or ends.
    Raises:
        StoppedError: after SIGTERM or SIGINT, once the trainers have saved and ended.
    """
    waiting = list(runs)
    slots = (
        [list(gpus[i * processes : (i + 1) * processes]) for i in range(jobs)] if gpus else [[] for _ in range(jobs)]
    )
    threads = max((os.cpu_count() or 1) // (jobs * processes), 1)
    working: list[_Working] = []
    stop = False

    def on_signal(_number: int, _frame: Any) -> None:
        nonlocal stop
        stop = True
        for entry in working:
            entry.process.terminate()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while working or (waiting and not stop):
            while waiting and slots and not stop:
                run, slot = waiting.pop(0), slots.pop(0)
                environment = {"CUDA_VISIBLE_DEVICES": ",".join(slot)} if gpus else {}
                if jobs * processes > 1 and not gpus:
                    environment["OMP_NUM_THREADS"] = str(threads)
                report(f"start  {run.name}")
                process = _start(folder_of(run), processes, environment)
                working.append(_Working(run, process, slot, time.monotonic()))
                for entry in working:
                    entry.beside = max(entry.beside, 0 if gpus else len(working) - 1)
            for entry in list(working):
                if entry.process.poll() is None:
                    continue
                working.remove(entry)
                slots.append(entry.slot)
                seconds = time.monotonic() - entry.began
                state = record_end(
                    folder_of(entry.run),
                    entry.run.config.training.steps,
                    entry.process.returncode,
                    seconds,
                    keep_checkpoints,
                    entry.beside,
                )
                report(f"{state:<7}{entry.run.name} ({seconds:.0f} s)")
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop:
        raise StoppedError


def run_one(folder: str, steps: int, processes: int, keep_checkpoints: bool) -> str:
    """Run one run from start to end, and wait for it: the body of a SLURM job."""
    began = time.monotonic()
    process = _start(Path(folder), processes, {})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    exit_status = process.wait()
    return record_end(Path(folder), steps, exit_status, time.monotonic() - began, keep_checkpoints)


def run_on_cluster(
    runs: Sequence[Run],
    *,
    output_dir: Path,
    processes: int,
    gpus_per_run: int,
    jobs: int,
    keep_checkpoints: bool,
    partition: str,
    timeout_minutes: int,
    report: Callable[[str], None],
    cluster: str = "slurm",
) -> None:
    """Submit the runs as one job array and wait for it.

    Args:
        jobs: how many runs may work at the same time.
        cluster: "slurm"; or submitit's "local", which starts processes on this machine.
    Raises:
        UserError: submitit or SLURM is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--executor slurm: needs submitit; install it with: pip install 'titan_peer[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=output_dir / "slurm", cluster=cluster)
    except RuntimeError as error:
        raise UserError(f"--executor slurm: {error}") from None
    executor.update_parameters(name="titan-peer-ablate", timeout_min=timeout_minutes, gpus_per_node=gpus_per_run)
    if cluster == "slurm":
        executor.update_parameters(tasks_per_node=1, slurm_array_parallelism=jobs)
        if partition:
            executor.update_parameters(slurm_partition=partition)
    with executor.batch():
        submitted = [
            executor.submit(run_one, str(folder_of(run)), run.config.training.steps, processes, keep_checkpoints)
            for run in runs
        ]
    for run, job in zip(runs, submitted):
        report(f"queued {run.name} as job {job.job_id}")
    for run, job in zip(runs, submitted):
        try:
            report(f"{job.result():<7}{run.name}")
        except Exception as error:  # for whatever reason the job was lost, the others go on
            report(f"lost   {run.name}: {str(error).splitlines()[0]}; --resume starts it again")
