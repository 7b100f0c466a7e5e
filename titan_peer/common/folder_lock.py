"""Only one job at a time writes to a folder: the file `.job.lock` in it names the writing process, by host and process
id.

Two mechanisms protect the folder. The first is a POSIX lock on that file: the kernel releases it whenever the process
ends, and child processes do not inherit it. It makes taking the folder atomic on one machine, and between machines if
the file system forwards locks (NFS, Lustre mounted with `flock`). The second is the file's text, whose counter the
holder raises every few seconds. If there are no locks, or only local ones (Lustre with `localflock`), the text decides:
a holder on this machine is looked up by process id and start time, and a holder on another machine must raise its
counter while we watch.

Not covered without locks: if two jobs start within a second of each other on two machines, both may begin, until one of
them sees the other's name in the file and stops.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from titan_peer.common.errors import UserError, os_failure

logger = logging.getLogger("titan_peer")

NAME = ".job.lock"
BEAT_SECONDS = 4.0
WATCH_SECONDS = 12.0  # a holder on another machine counts as dead after this time without a beat
_POLL_SECONDS = 0.2
_SETTLE_SECONDS = 1.0  # without locks: if several processes write their names at once, the last one gets the folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_LENGTH = 1024  # the text's length, always the same, so that no reader sees half of it

Holder = dict[str, Any]
_FIELDS: dict[str, type] = {"host": str, "boot": str, "pid": int, "started": str, "beats": int}


def _boot() -> str:
    """Identifies this boot of this machine, and this container, among others with the same host name."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process was started, in the kernel's clock ticks; empty if unknown."""
    with suppress(OSError, IndexError):
        # after the name in parentheses, which may contain anything
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return ""


def is_running(pid: int) -> bool:
    """Whether a process on this machine has this process id."""
    with suppress(PermissionError):  # it exists, but belongs to another user
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


def _is_alive(holder: Holder) -> bool:
    """Whether a holder on this machine still runs."""
    return is_running(holder["pid"]) and _started(holder["pid"]) in (holder["started"], "")


def _named(holder: Holder) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


class FolderLock:
    """Locks `folder` for this process, until `release` or the end of the process.

    Args:
        key: the job's key for the folder, for messages.
        wait_seconds: how long to wait for another process to release it, since that one may be about to end.
    Raises:
        UserError: another process still has it after that time.
        UserError, TransientError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, wait_seconds: float, key: str = "job.dump_folder") -> None:
        self._made_folder = not folder.exists()
        self.folder, self.path, self.key = folder, folder / NAME, key
        pid = os.getpid()
        self._me: Holder = {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}
        self._beats, self._lost_to = 0, ""
        try:
            self._file, self._has_lock = self._take(wait_seconds)
        except OSError as error:
            raise os_failure(f"{key} = {folder}: cannot be written to", error) from None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder lock", daemon=True)
        self._thread.start()

    def require_mine(self) -> None:
        """Raise UserError if another process has taken the folder over, which can happen while this one is
        suspended."""
        if self._lost_to:
            raise UserError(f"{self.key} = {self.folder}: {self._lost_to} has taken it over; this job ends")

    def release(self) -> None:
        """Release the folder; if it was created here and contains nothing else, it is removed."""
        self._closed.set()
        self._thread.join()
        if self._made_folder and not self._lost_to:
            with suppress(OSError):
                if [entry.name for entry in self.folder.iterdir()] == [NAME]:
                    self.path.unlink()
                    self.folder.rmdir()
        if not self._lost_to:
            with suppress(OSError):
                os.ftruncate(self._file, 0)
        os.close(self._file)

    # ---- internals

    def _take(self, wait_seconds: float) -> tuple[int, bool]:
        """The open file, once it names this process, and whether the file system has locks."""
        deadline, is_said, watch = time.monotonic() + wait_seconds, False, _Watch()
        while True:
            # opened again each time, because NFS reads what others have written only then, and because the last holder
            # may have removed the folder
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                lock, holder = _try_lock(file), _read(file)
                in_place = self._is_in_place(file)
                is_free = lock is not False and in_place
                is_free = is_free and (self._is_mine(holder) or watch.is_gone(holder, self._me))
                if is_free:
                    self._write(file)
                    if lock is None:
                        self._settle(file)
                    return file, lock is True
                is_undecided = not in_place or (lock is not False and watch.is_undecided)
                if time.monotonic() >= deadline and not is_undecided:
                    raise UserError(
                        f"{self.key} = {self.folder}: {_named(holder)} is writing to it; wait until it has ended "
                        f"or give another {self.key}"
                    )
            except BaseException:
                os.close(file)
                raise
            if not is_said:
                logger.warning("waiting for %s, which is writing to %s", _named(holder), self.folder)
                is_said = True
            time.sleep(_POLL_SECONDS)
            os.close(file)

    def _is_in_place(self, file: int) -> bool:
        """Whether an open file is still the folder's lock: its last holder may have removed it."""
        try:
            return self.path.stat().st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            return False

    def _settle(self, file: int) -> None:
        time.sleep(_SETTLE_SECONDS)
        if not self._is_mine(_read(file)):
            raise UserError(f"{self.key} = {self.folder}: {_named(_read(file))} has started in it at the same time")

    def _is_mine(self, holder: Holder) -> bool:
        return {**holder, "beats": 0} == {**self._me, "beats": 0}

    def _write(self, file: int) -> None:
        self._beats += 1
        text = json.dumps({**self._me, "beats": self._beats}).encode()
        os.pwrite(file, text.ljust(_LENGTH - 1) + b"\n", 0)
        with suppress(OSError):
            os.fsync(file)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full disk or an unreachable server: the next beat may succeed
                holder = self._holder_now()
                if holder and not self._is_mine(holder):
                    self._lost_to = _named(holder)
                    return
                self._write(self._file)

    def _holder_now(self) -> Holder:
        """The holder that the file names; without locks, or if the file was replaced, it is opened again."""
        try:
            is_same = self.path.stat().st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:  # a user has removed the folder of a running job, which is allowed
            return {}
        if is_same and self._has_lock:
            return _read(self._file)  # closing another descriptor of the same file would release the lock
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(file)
        finally:
            os.close(file)


class _Watch:
    """Observes a holder repeatedly, to find out whether it is still alive."""

    def __init__(self) -> None:
        self._seen: Holder | None = None
        self._since = 0.0
        self._has_beaten = False
        self.is_undecided = False
        """A holder on another machine has shown no sign of life yet and has not been watched long enough."""

    def is_gone(self, holder: Holder, me: Holder) -> bool:
        self.is_undecided = False
        if not holder:
            return True
        if (holder["host"], holder["boot"]) == (me["host"], me["boot"]):
            return not _is_alive(holder)
        now = time.monotonic()
        if holder != self._seen:
            self._has_beaten = self._seen is not None
            self._seen, self._since = holder, now
        self.is_undecided = not self._has_beaten
        return now - self._since >= WATCH_SECONDS


def _try_lock(file: int) -> bool | None:
    """Whether this process now has the file's lock; None if the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(file: int) -> Holder:
    """The holder that the file names; empty: none."""
    try:
        holder = json.loads(os.pread(file, _LENGTH, 0))
        return {name: kind(holder[name]) for name, kind in _FIELDS.items()}
    except (ValueError, TypeError, KeyError):
        return {}
