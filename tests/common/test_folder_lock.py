"""Only one job at a time uses a folder: between processes, after a kill, across machines, and without locks of the file
system."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from titan_peer.common import folder_lock
from titan_peer.common.errors import UserError
from titan_peer.common.folder_lock import NAME, FolderLock

CONTEXT = multiprocessing.get_context("fork")  # starts quickly; the children only hold a lock


def hold(folder: Path, parent: Connection) -> None:
    lock = FolderLock(folder, wait_seconds=0)
    parent.send("has it")
    parent.poll(60)  # until the parent writes a line or ends
    lock.release()


@contextmanager
def another_process(folder: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that holds the folder, and the pipe through which any line makes it end."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(folder, there))
    process.start()
    try:
        assert here.poll(30) and here.recv() == "has it"
        yield process, here
    finally:
        if process.is_alive():
            here.send("end")
        process.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with shorter times."""
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 0.6)
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(folder_lock, "_SETTLE_SECONDS", 0.3)


@pytest.fixture(params=["locks", "no locks"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one that answers like those without locks."""
    if request.param == "no locks":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", refuse)
    return str(request.param)


def test_a_second_process_is_refused_by_name(tmp_path: Path, file_system: str) -> None:
    with another_process(tmp_path) as (holder, _), pytest.raises(UserError) as caught:
        FolderLock(tmp_path, wait_seconds=0.2)
    assert f"job.dump_folder = {tmp_path}: process {holder.pid} on " in str(caught.value)


def test_a_process_about_to_end_is_waited_for(tmp_path: Path, file_system: str) -> None:
    with another_process(tmp_path) as (_, line):
        start = time.monotonic()
        threading.Timer(0.5, lambda: line.send("end")).start()
        FolderLock(tmp_path, wait_seconds=30).release()
        assert 0.4 < time.monotonic() - start < 20


def test_what_a_killed_process_had_is_taken_over_at_once(tmp_path: Path, file_system: str) -> None:
    with another_process(tmp_path) as (holder, _):
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        assert json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["pid"] == holder.pid
        FolderLock(tmp_path, wait_seconds=0).release()


def test_a_released_folder_is_free(tmp_path: Path, file_system: str) -> None:
    for _ in range(2):
        FolderLock(tmp_path, wait_seconds=0).release()
    assert (tmp_path / NAME).read_bytes() == b""


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, wait_seconds=0)
    holder = {**lock._me, "pid": 1, "started": "another time", "beats": 7}  # 1 always runs
    lock.release()
    (tmp_path / NAME).write_text(json.dumps(holder), encoding="utf-8")
    FolderLock(tmp_path, wait_seconds=0).release()


ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 77, "started": "5"}


def write_elsewhere(folder: Path, beats: int) -> None:
    """Write as a process on another machine would: the whole text at once, over the old text."""
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, json.dumps({**ELSEWHERE, "beats": beats}).encode().ljust(1024), 0)
    os.close(file)


def test_a_silent_process_on_another_machine_is_taken_over_after_a_while(tmp_path: Path, file_system: str) -> None:
    write_elsewhere(tmp_path, 7)
    start = time.monotonic()
    FolderLock(tmp_path, wait_seconds=0).release()
    assert time.monotonic() - start >= folder_lock.WATCH_SECONDS


def beat_elsewhere(folder: Path) -> None:
    for beats in range(1_000):
        write_elsewhere(folder, beats)
        time.sleep(0.05)


def test_a_process_on_another_machine_that_lives_is_left_its_folder(tmp_path: Path, file_system: str) -> None:
    write_elsewhere(tmp_path, 0)
    writer = CONTEXT.Process(target=beat_elsewhere, args=(tmp_path,))
    writer.start()
    try:
        with pytest.raises(UserError, match="process 77 on elsewhere is writing to it"):
            FolderLock(tmp_path, wait_seconds=0)
    finally:
        writer.kill()
        writer.join()


def test_a_process_whose_folder_was_taken_over_is_told(tmp_path: Path, file_system: str) -> None:
    lock = FolderLock(tmp_path, wait_seconds=0)
    lock.require_mine()
    write_elsewhere(tmp_path, 7)
    time.sleep(0.5)
    with pytest.raises(UserError, match="process 77 on elsewhere has taken it over"):
        lock.require_mine()
    lock.release()
    assert "elsewhere" in (tmp_path / NAME).read_text(encoding="utf-8")


def test_of_two_that_start_at_once_without_locks_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    # the other process saw an empty file before this one came, and writes while this one waits for such writers
    writer = CONTEXT.Process(target=lambda: (time.sleep(0.15), write_elsewhere(tmp_path, 1)))
    writer.start()
    with pytest.raises(UserError, match="process 77 on elsewhere has started in it at the same time"):
        FolderLock(tmp_path, wait_seconds=0)
    writer.join()


def test_a_folder_made_for_a_job_that_does_not_begin_is_removed_and_a_waiting_job_makes_it_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "new"
    FolderLock(folder, wait_seconds=0).release()
    assert not folder.exists()
    first = FolderLock(folder, wait_seconds=0)
    (folder / "config.toml").write_text("", encoding="utf-8")
    first.release()
    assert sorted(p.name for p in folder.iterdir()) == [".job.lock", "config.toml"]
    unlinked = os.open(tmp_path / ".job.lock", os.O_RDWR | os.O_CREAT)  # a lock file that its job has just removed
    (tmp_path / ".job.lock").unlink()
    lock = FolderLock(tmp_path, wait_seconds=0)
    assert not lock._is_in_place(unlinked) and lock._is_in_place(lock._file)
    lock.release()
    os.close(unlinked)
