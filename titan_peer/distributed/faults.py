"""When a process loses contact with others: find out which ones no longer respond, and report it to the launcher.

A collective that fails or times out does not say which process is missing, and the process that noticed is not the one
to look at. So every process that fails signs a list in the job's store and then checks which processes have not signed.
"""

from __future__ import annotations

import os
import time

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from titan_peer.distributed.world import joined_as

ROLL_CALL_SECONDS = 5.0


class LostContactError(Exception):
    """This process failed because it could not reach others."""


def silent_ranks(seconds: float = ROLL_CALL_SECONDS) -> list[int]:
    """Sign the list of processes that have failed; returns the ranks that have not signed it after `seconds`."""
    store = dist.distributed_c10d._get_default_store()
    # each restart has its own list
    prefix = f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    own, size = joined_as()
    store.set(f"{prefix}/{own}", "")
    missing = [rank for rank in range(size) if rank != own]
    deadline = time.monotonic() + seconds
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]
    return missing


def report_failure(error: Exception) -> None:
    """Record for the launcher why this process fails, and which processes have not responded."""
    if not dist.is_initialized():
        return
    words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        missing = silent_ranks()
    except (RuntimeError, OSError):  # the store ended together with the launcher that held it
        missing = []
    if missing:
        named = ", ".join(map(str, missing))
        words = f"no sign of life from rank{'s' if len(missing) > 1 else ''} {named}; {words}"
    get_error_handler().record_exception(LostContactError(words) if missing else error)


def leave_word(error: Exception) -> None:
    """Record for the launcher why this process fails. The launcher prints the first failure only."""
    get_error_handler().record_exception(error)
