"""Why a job ends before its time: said to the user and to the launcher, and turned into an exit status.

torch is imported where it is needed, since a mistake in the arguments is answered by this file before anything else is
imported.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

from titan_peer.common.errors import NOT_FINITE_STATUS, USER_ERROR_STATUS, TransientError, UserError
from titan_peer.common.launched import launched_as


class NonFiniteLossError(Exception):
    """The loss or the gradient's norm is NaN or infinite."""


def is_first_process() -> bool:
    """Whether this is rank 0 of the job, as the launcher has said in the environment."""
    return launched_as()[0] == 0


def exit_status(failure: BaseException) -> int:
    """Say why the job ends, on standard error and to the launcher; returns the exit status.

    What every process knows is printed by the first process only.
    """
    match failure:
        case UserError():
            _tell(failure)
            return USER_ERROR_STATUS
        case NonFiniteLossError():
            _tell(failure)
            return NOT_FINITE_STATUS
        case TransientError():
            _tell(failure)
            return 1
    _tell_of_a_fault(failure)
    return 1


def _tell(failure: Exception) -> None:
    if is_first_process():
        _end_with_own_status()
        for line in str(failure).splitlines():
            print(f"error: {line}", file=sys.stderr)
    else:
        from titan_peer.distributed.faults import leave_word

        leave_word(failure)


def _end_with_own_status() -> None:
    """Have the launcher's SIGTERM, sent because another process has ended, not end this one between its words and its
    exit: the launcher tells from the exit status that they have been said."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _tell_of_a_fault(failure: BaseException) -> None:
    """The same for what went wrong on some process or with the machine."""
    from titan_peer.checkpoint.saving import CheckpointSaveError
    from titan_peer.distributed.collectives import ProcessesFailedError
    from titan_peer.distributed.faults import leave_word, report_failure

    match failure:
        case CheckpointSaveError():
            if is_first_process():
                print(f"error: the job ends without its last checkpoint: {failure}", file=sys.stderr)
        case ProcessesFailedError():
            cause = failure.__cause__  # None: it went wrong on another process
            if cause is not None and not isinstance(cause, UserError | TransientError):
                traceback.print_exception(cause)
            leave_word(failure)
            if is_first_process():
                print(f"error: {failure}", file=sys.stderr)
        case _:
            traceback.print_exception(failure)
            if isinstance(failure, Exception):
                report_failure(failure)
