"""`titan-peer estimate`: the memory a process of a job will take, before it is launched.

The books of one step on fake tensors (`dry_run.py`), and on a CPU, where a run reports the resident set of its process,
what the interpreter and the libraries take.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from titan_peer.config import JobConfig, load_config
from titan_peer.dry_run import StepTrace, fake_world, trace_step
from titan_peer.parallelize import World
from titan_peer.units import bytes_text

MIB = 2**20

PROCESS_BASE = 560 * MIB
"""Resident set of a process that trains a model of no size: interpreter, torch, tokenizer, text, kernels, thread stacks.
Measured with torch 2.13 for CPU on x86-64; see docs/analysis.md."""
COMPILER_BASE = 250 * MIB
"""What torch.compile adds to it: the compiler's modules and caches."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Most memory a process will have taken, bytes."""

    by_kind: dict[str, int]
    """Tensors, by what they are for, at the moment of the most bytes."""
    process_base: int
    """On a CPU: interpreter and libraries. 0 on a GPU, whose allocator has tensors only."""
    world_size: int

    @property
    def total(self) -> int:
        return sum(self.by_kind.values()) + self.process_base

    def line(self) -> str:
        """One line for the banner."""
        parts = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in self.by_kind.items() if size)
        base = f" + process {bytes_text(self.process_base)}" if self.process_base else ""
        return f"about {bytes_text(self.total)} a process: {parts}{base}"


def from_trace(trace: StepTrace, config: JobConfig, world: World) -> MemoryEstimate:
    base = 0
    if world.device.type == "cpu":
        base = PROCESS_BASE + (COMPILER_BASE if config.compile.enable else 0)
    return MemoryEstimate(trace.memory, base, world.world_size)


def estimate_memory(config: JobConfig, world_size: int) -> MemoryEstimate:
    """The memory of rank 0 of `world_size` processes; fills in what the job leaves to the tokenizer and the world size.

    Raises:
        UserError: parallel degrees or batch do not fit the number of processes.
    """
    with fake_world(config, world_size) as world:
        return from_trace(trace_step(config, world), config, world)


def main(args: Sequence[str] | None = None) -> int:
    """Print the estimate for a job; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="titan-peer estimate",
        description="The memory a process of a job will take. Nothing is allocated: a training step runs on fake tensors.",
        epilog="Any key of a job may follow, as for run_train.sh.\n\nExamples:\n"
        "  titan-peer estimate --job.config_file train_configs/peer_1m.toml --training.local_batch_size 4\n"
        "  titan-peer estimate --job.config_file train_configs/peer_1m_multinode.toml --world-size 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, default=1, help="processes of the job, all machines together")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes by kind")
    options, job_arguments = parser.parse_known_args(args)
    if options.world_size < 1:
        parser.error(f"--world-size = {options.world_size}: must be at least 1")
    config = load_config(job_arguments)
    estimate = estimate_memory(config, options.world_size)
    if options.json:
        print(json.dumps({**estimate.by_kind, "process": estimate.process_base, "total": estimate.total}))
        return 0
    print(memory_table(estimate.by_kind, estimate.process_base, estimate.total))
    if not torch.cuda.is_available():
        print(
            "The process is that of a CPU run. On a GPU: the sum of the tensors, and what its allocator keeps in reserve."
        )
    return 0


def memory_table(by_kind: dict[str, int], process_base: int, total: int) -> str:
    rows = [*by_kind.items(), ("process (interpreter, libraries)", process_base), ("most at a time", total)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {bytes_text(size):>12}" for name, size in rows if size)


if __name__ == "__main__":
    sys.exit(main())
