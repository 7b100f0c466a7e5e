"""How many threads a loop on the CPU has, and how they wait for each other.

By default a thread that has finished its part of a loop spins until the others have finished. If other programs use the
cores too, it spins in every short loop for as long as one of the other threads has no core, so generation and training
take many times as long. Threads that sleep while they wait cost nothing measurable in training on idle cores, but must
be woken for each short loop, so decoding with a small model takes longer with them than in a single thread
(benchmarks/busy_cores.py).

`let_waiting_threads_sleep` must be called before torch is imported, which loads OpenMP; so torch is imported in
functions here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def let_waiting_threads_sleep() -> None:
    """Set it for this process and those it starts, unless the user has chosen how threads wait; run_train.sh does the
    same."""
    if not any(os.environ.get(name) for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def threads_are_chosen(default: int) -> bool:
    """Whether the user has set how many threads torch has: by a variable, or by a call since it had `default`."""
    import torch

    return any(os.environ.get(name) for name in _COUNTS) or torch.get_num_threads() != default


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's loops of this thread run in it alone; afterwards there are as many threads as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
