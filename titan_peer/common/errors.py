"""Errors that are printed as a message without a traceback: what the user can correct, and what may pass; and the exit
statuses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input found before or during a job.

    The message names the key or file, the value found, what is allowed and, if it helps, what to do.
    Entry points print it on standard error and exit with status 2.
    """


class TransientError(Exception):
    """A disk, a file server or the network has failed, and may work the next time.

    Entry points print it as they do a UserError, but exit with status 1: a job is started again by MAX_RESTARTS.
    """


class Problems:
    """What is wrong in several things that are checked one after another, so that the user hears of all of it at
    once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add_if(self, is_wrong: bool, problem: str) -> None:
        if is_wrong:
            self.found.append(problem)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """What is refused inside is kept, and what comes after it inside is left out."""
        try:
            yield
        except UserError as error:
            self.found.append(str(error))

    def refuse(self) -> None:
        """Raise UserError with all of them, a line each, if there are any."""
        if self.found:
            raise UserError("\n".join(self.found))


USER_ERROR_STATUS = 2
NOT_FINITE_STATUS = 3
"""The loss or the gradient is NaN or infinite."""
FINAL_STATUSES = (USER_ERROR_STATUS, NOT_FINITE_STATUS)
"""Exit statuses of a job that would end in the same way if it were started again."""

# What a person has to mend: a path, a right, a full disk. All else that the system reports may be gone the next time.
_LASTING = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EXDEV),
    *(errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV, errno.ENXIO),
}


def is_transient(error: BaseException) -> bool:
    """Whether doing the same again may go well: an I/O error, a stale handle, a connection, a timeout.

    An OSError without a number is a library's own, which has found the file's content to be wrong.
    """
    if isinstance(error, TransientError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _LASTING


def os_failure(what: str, error: OSError) -> UserError | TransientError:
    """The exception to raise when the system reports `error`; `what` says what cannot be done."""
    message = f"{what}: {error.strerror or error}"
    return TransientError(message) if is_transient(error) else UserError(message)
