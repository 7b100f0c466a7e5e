"""`titan-peer estimate`: the memory a process of a job will take, before it is launched.

The books of one step on fake tensors (`dry_run.py`); and on a CPU, where a run reports the resident set of its process,
what interpreter, libraries and the heap take besides.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from titan_peer.analysis.dry_run import fake_world, trace_step
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import UserError
from titan_peer.common.units import bytes_text
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config

MIB = 2**20

PROCESS_BASE = 560 * MIB
"""Resident set of a process that trains a model of hardly any size: interpreter, torch, tokenizer, text, kernels, threads."""
COMPILER_BASE = 50 * MIB
"""What torch.compile adds to it: the compiler's modules and caches."""
ALLOCATOR_SHARE = {False: 0.5, True: 0.15}
"""What the C library's heap keeps besides, and buffers inside of operators, as a share of the memory that comes and goes in
a step; with compile.enable False and True. Measured on CPU, see docs/analysis.md."""
_KEPT = ("parameters", "moments", "expert usage", "row-gradient factors", "checkpoint copy")
"""Kinds of tensors that stay from step to step."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Most memory a process will have taken, bytes."""

    by_kind: dict[str, int]
    """Tensors, by what they are for, at the moment of the most bytes."""
    process: int
    """On a CPU: interpreter, libraries and what the heap keeps. 0 on a GPU, whose allocator has tensors only."""
    world_size: int

    @property
    def total(self) -> int:
        return sum(self.by_kind.values()) + self.process

    def rows(self) -> dict[str, int]:
        """By kind, what is not 0; the process last."""
        rows = {**self.by_kind, "process": self.process}
        return {name: size for name, size in rows.items() if size}


def estimate_memory(config: JobConfig, world_size: int) -> MemoryEstimate:
    """The memory of rank 0 of `world_size` processes, on a device as this machine's.

    Raises:
        UserError: the vocabulary, the parallel degrees or the batch do not fit.
    """
    config = copy.deepcopy(config)
    with fake_world(config, world_size) as world:
        memory = trace_step(config, world).memory
    process = 0
    if not torch.cuda.is_available():
        if config.checkpoint.enable and config.checkpoint.async_mode == "async":
            memory["checkpoint copy"] = memory["parameters"] + memory["moments"]
        comes_and_goes = sum(size for kind, size in memory.items() if kind not in _KEPT)
        compiled = config.compile.enable
        process = PROCESS_BASE + compiled * COMPILER_BASE + round(ALLOCATOR_SHARE[compiled] * comes_and_goes)
    return MemoryEstimate(memory, process, world_size)


def main(args: Sequence[str] | None = None) -> int:
    """Print the estimate for a job; returns the exit status."""
    parser = CommandParser(
        "estimate",
        "The memory that each process of a job will take. Nothing is allocated: a training step runs on fake tensors.",
        "Any key of the job may be given besides, as for run_train.sh.\n\nexamples:\n"
        "  titan-peer estimate --job.config_file train_configs/peer_1m.toml --training.local_batch_size 4\n"
        "  titan-peer estimate --job.config_file train_configs/peer_1m_multinode.toml --world_size 16",
    )
    parser.add_argument(
        "--world_size",
        type=int,
        default=1,
        metavar="N",
        help="processes of the job, all machines together (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes by kind")
    options, job_arguments = parser.parse_known_args(args)
    if options.world_size < 1:
        raise UserError(f"--world_size {options.world_size}: must be at least 1")
    config = load_config(job_arguments)
    estimate = estimate_memory(config, options.world_size)
    if options.json:
        print(json.dumps({**estimate.rows(), "total": estimate.total}))
        return 0
    rows = {**estimate.rows(), "most at a time": estimate.total}
    width = max(map(len, rows))
    for name, size in rows.items():
        print(f"{name:<{width}}  {bytes_text(size):>12}")
    if torch.cuda.is_available():
        print("Tensors only; the GPU's allocator keeps some memory in reserve besides.")
    else:
        print("process: interpreter and libraries of a CPU run; a GPU has the tensors only.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
