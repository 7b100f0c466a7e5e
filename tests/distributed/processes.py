"""Real processes for tests: gloo on a CPU, NCCL if there are enough GPUs."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from warm_processes import START_METHOD

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 1500


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def _enter(rank: int, world_size: int, port: int) -> None:
    """Set the environment as torchrun does. Processes share the cores, so each uses one thread."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    if torch.cuda.device_count() < world_size:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(ROOT)
    torch.set_num_threads(1)


def _run_function(rank: int, world_size: int, port: int, folder: str, function: Any, arguments: Any) -> None:
    _enter(rank, world_size, port)
    result = function(*arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def run_in_processes(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in each of `world_size` new processes; returns what they return (JSON), by rank.

    Raises:
        AssertionError: a process failed (its traceback is in the message) or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run_function,
            args=(world_size, free_port(), folder, function, arguments),
            nprocs=world_size,
            join=False,
            start_method=START_METHOD,
        )
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while not context.join(timeout=5):
                assert time.monotonic() < deadline, f"{function.__name__}: not done after {TIMEOUT_SECONDS} s"
        except mp.ProcessRaisedException as error:
            raise AssertionError(str(error)) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def _train_all(jobs: list[list[str]], ports: list[int]) -> None:
    from titan_peer import train

    for arguments, port in zip(jobs, ports):
        os.environ["MASTER_PORT"] = str(port)
        torch._dynamo.reset()
        assert train.main(arguments) == 0, f"job {arguments} failed"


def train_jobs(world_size: int, jobs: Sequence[Sequence[object]]) -> None:
    """Run whole training jobs, one after another, in the same `world_size` processes, because starting processes is
    slow."""
    ports = [free_port() for _ in jobs]
    run_in_processes(world_size, _train_all, [[str(a) for a in job] for job in jobs], ports)


def losses(folder: Path) -> list[float]:
    """The loss of every step of the job that wrote to `folder` (with metrics.log_freq = 1)."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]
