"""How OpenMP's threads wait for each other. Must be set before torch is imported, which loads OpenMP.

By default a thread that has finished its part of a loop spins until the others have finished. If other programs use the cores
too, it spins in every short loop for as long as one of the other threads has no core, so generation and training take many
times as long. Threads that sleep while they wait cost nothing measurable in training on idle cores, but must be woken for each
short loop, so a small model generates at about half the speed there (benchmarks/busy_cores.py).
"""

from __future__ import annotations

import os

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep() -> None:
    """Set it for this process and those it starts, unless the user has chosen how threads wait; run_train.sh does the same."""
    if not any(os.environ.get(name) for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
