"""How OpenMP's threads wait for each other. To be said before torch is imported, which loads OpenMP.

A thread that has done its part of a loop spins until the others are done. On cores that other programs use too, it spins for as
long as one of the others is without a core, in every short loop; generation and training then take many times as long. Threads
that sleep meanwhile cost nothing measurable in training on idle cores, but have to be woken for each short loop: a small model
generates there at about half the speed (benchmarks/busy_cores.py).
"""

from __future__ import annotations

import os

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep() -> None:
    """In this process and those it starts, unless the user has set how threads wait; run_train.sh does the same."""
    if not any(os.environ.get(name) for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
