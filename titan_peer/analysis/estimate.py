"""The memory per process of a job, before it is launched.

It is what the ledger of one step on fake tensors (`dry_run.py`) says; on a CPU, where a run reports the resident set of
its process, the memory of the interpreter, the libraries and the heap is added.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from titan_peer.analysis.dry_run import fake_world, trace_step
from titan_peer.config.job import JobConfig

MIB = 2**20

PROCESS_BASE = 560 * MIB
"""Resident set of a process that trains a tiny model: interpreter, torch, tokenizer, text, kernels, threads."""
COMPILER_BASE = 50 * MIB
"""What torch.compile adds to it: the compiler's modules and caches."""
ALLOCATOR_SHARE = {False: 0.5, True: 0.15}
"""What the C library's heap keeps in reserve, and buffers inside operators, as a share of the memory that is allocated
and freed in a step; with compile.enable False and True. Measured on a CPU, see docs/analysis.md."""
_KEPT = ("parameters", "moments", "averaged weights", "expert usage", "row-gradient factors", "checkpoint copy")
"""Kinds of tensors that are kept from step to step."""
_SAVED = ("parameters", "moments", "averaged weights")
"""Those that checkpoints hold."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The most memory that a process will take at a time, in bytes."""

    by_kind: dict[str, int]
    """Tensors by purpose, at the moment when they take the most bytes."""
    process: int
    """On a CPU: interpreter, libraries and what the heap keeps. 0 on a GPU, whose allocator holds tensors only."""
    world_size: int

    @property
    def total(self) -> int:
        return sum(self.by_kind.values()) + self.process

    def rows(self) -> dict[str, int]:
        """Bytes by kind, without those that are 0; the process comes last."""
        rows = {**self.by_kind, "process": self.process}
        return {name: size for name, size in rows.items() if size}


def estimate_memory(config: JobConfig, world_size: int) -> MemoryEstimate:
    """The memory of rank 0 of `world_size` processes, on a device like this machine's.

    Raises:
        UserError: the vocabulary, the parallel degrees or the batch do not fit.
    """
    config = copy.deepcopy(config)
    with fake_world(config, world_size) as world:
        memory = trace_step(config, world).memory
    process = 0
    if not torch.cuda.is_available():
        if config.checkpoint.enable and config.checkpoint.async_mode == "async":
            memory["checkpoint copy"] = sum(memory[kind] for kind in _SAVED)
        comes_and_goes = sum(size for kind, size in memory.items() if kind not in _KEPT)
        compiled = config.compile.enable
        process = PROCESS_BASE + compiled * COMPILER_BASE + round(ALLOCATOR_SHARE[compiled] * comes_and_goes)
    return MemoryEstimate(memory, process, world_size)
