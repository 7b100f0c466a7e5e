"""When a process loses the others: find out which of them gives no sign of life, and leave word for the launcher.

A collective that fails or times out says nothing of who is missing, and the process that noticed is not the one to look at.
So every process that fails signs a list in the job's store, and looks who has not signed.
"""

from __future__ import annotations

import os
import time

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

ROLL_CALL_SECONDS = 5.0


class LostContactError(Exception):
    """A process failed because it could not reach others."""


def silent_ranks(seconds: float = ROLL_CALL_SECONDS) -> list[int]:
    """Sign the list of processes that have failed; the ranks that have not signed it after `seconds`."""
    store = dist.distributed_c10d._get_default_store()
    # a restart's list is its own
    prefix = f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store.set(f"{prefix}/{dist.get_rank()}", "")
    missing = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    deadline = time.monotonic() + seconds
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]
    return missing


def report_failure(error: Exception) -> None:
    """Record for the launcher how this process fails, and which processes it has heard nothing from."""
    if not dist.is_initialized():
        return
    words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        missing = silent_ranks()
    except (RuntimeError, OSError):  # the store has gone with the launcher that kept it
        missing = []
    if missing:
        named = ", ".join(map(str, missing))
        words = f"no sign of life from rank{'s' if len(missing) > 1 else ''} {named}; {words}"
    get_error_handler().record_exception(LostContactError(words) if missing else error)


def leave_word(error: Exception) -> None:
    """Record for the launcher how this process fails; it names the first one's failure only, and prints that."""
    get_error_handler().record_exception(error)
