"""Which system errors are temporary, and which a person must correct."""

from __future__ import annotations

import errno
import gzip

import pytest

from titan_peer.common.errors import TransientError, UserError, is_transient, os_failure

PASSING = [
    *(OSError(number, "said") for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENFILE)),
    *(ConnectionError("reset"), TimeoutError("too late"), TransientError("said before")),
]
LASTING = [
    *(OSError(number, "said") for number in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR)),
    *(gzip.BadGzipFile("not gzip"), ValueError("no number"), EOFError("cut off")),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_failing_disks_servers_and_networks_may_pass(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_a_person_has_to_mend_does_not_pass(error: Exception) -> None:
    assert not is_transient(error)


def test_the_message_says_what_cannot_be_done_and_why() -> None:
    stale, missing = OSError(errno.ESTALE, "Stale file handle"), FileNotFoundError(errno.ENOENT, "No such file")
    assert isinstance(os_failure("a.jsonl: cannot be read", stale), TransientError)
    assert str(os_failure("a.jsonl: cannot be read", stale)) == "a.jsonl: cannot be read: Stale file handle"
    assert isinstance(os_failure("a.jsonl: cannot be read", missing), UserError)
