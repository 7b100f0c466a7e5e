"""Write one checkpoint with all processes of a job, whole or not at all, on the training thread or in the background.

Every stage ends with an exchange of results, so that a full disk on one process fails the save on all of them and no
process waits for one that has given up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from titan_peer.checkpoint.files import ManifestEntries, manifest_entries, sync, write_manifest
from titan_peer.checkpoint.folder import AVERAGE, MODEL
from titan_peer.checkpoint.removal import hidden_name
from titan_peer.common.errors import UserError
from titan_peer.distributed.collectives import ProcessesFailedError, new_gloo_group, on_all_processes
from titan_peer.distributed.world import joined_as

logger = logging.getLogger("titan_peer")

T = TypeVar("T")

# One process may have much more to write than another. A process that has died is noticed at once nevertheless.
_SLOWEST_WRITER = datetime.timedelta(minutes=30)


_ALIGNMENT = 64  # bytes; also what torch.save aligns numbers to within its archive


class CheckpointSaveError(Exception):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


class Ranks:
    """The processes of a job, for saving and loading, with a gloo group that training does not use."""

    def __init__(self) -> None:
        self.is_alone = not dist.is_initialized()
        self.group = None if self.is_alone else new_gloo_group(_SLOWEST_WRITER)
        self.rank, self.size = joined_as()
        self.is_first = self.rank == 0

    def all_do(self, action: Callable[[], T]) -> list[T]:
        """`on_all_processes` over this group.

        Raises:
            UserError, TransientError, ProcessesFailedError: on every process.
        """
        try:
            return on_all_processes(action, self.group)
        except ProcessesFailedError as error:
            if error.__cause__ is not None and not isinstance(error.__cause__, OSError):
                # neither disk nor network, but a programming error, whose traceback only this process has
                logger.error("rank %d:", self.rank, exc_info=error.__cause__)
            raise

    def first_does(self, action: Callable[[], T]) -> T:
        """Run `action` on the first process; all processes get its result, or the error that `all_do` raises."""
        results = self.all_do(lambda: action() if self.is_first else None)
        return results[0]  # type: ignore[return-value]


def write_checkpoint(
    folder: Path, step: int, tensors: Callable[[], dict[str, Tensor]], documents: dict[str, bytes], ranks: Ranks
) -> Path:
    """Write `folder/step-N`: each process writes its parts of the tensors, the first one also `documents` by file name.

    Args:
        tensors: makes the tensors; called once, before anything else, and may fail on any process.
    Returns:
        The complete checkpoint's folder, on every process.
    Raises:
        CheckpointSaveError: on every process; the attempt leaves nothing behind, and earlier checkpoints are unchanged.
    """
    final, partial = folder / f"step-{step}", None
    mine: dict[str, Tensor] = {}
    try:
        ranks.all_do(lambda: mine.update(tensors()))
        partial = folder / ranks.first_does(lambda: _make_partial(folder, step))
        _write_tensors(partial, mine, ranks)
        written = partial
        shares = ranks.all_do(lambda: _finish_own_files(written, documents, ranks))
        entries = {name: entry for share in shares for name, entry in share.items()}
        ranks.first_does(lambda: _publish(written, final, step, entries))
    except (ProcessesFailedError, UserError, CheckpointSaveError) as error:
        if ranks.is_first and partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise CheckpointSaveError(str(error)) from error
    return final


def _make_partial(folder: Path, step: int) -> str:
    partial = folder / hidden_name(step, "partial")
    partial.mkdir(parents=True)
    return partial.name


def _write_tensors(partial: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    try:
        writer = _Writer(partial)
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.is_alone)
    except CheckpointException as error:
        causes = (f"rank {rank}: {_first_line(cause)}" for rank, (cause, _) in error.failures.items())
        raise CheckpointSaveError("; ".join(causes)) from None


class _Writer(FileSystemWriter):
    """Writes `__RANK_model_0.distcp` and `__RANK_ema_0.distcp`, of which inference reads one or the other, and
    `__RANK_state_0.distcp`; tensors begin at multiples of 64 bytes, so that they can be memory-mapped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False)
        self.fs = _AligningFileSystem()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        parts: dict[str, list[WriteItem]] = {MODEL: [], AVERAGE: [], "state": []}
        for item in plan.items:
            name = item.index.fqn
            parts[next((part for part in (MODEL, AVERAGE) if name.startswith(part)), "state")].append(item)
        results: list[WriteResult] = []
        try:
            for part, items in parts.items():
                prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{part.rstrip('.')}_")
                if items:
                    written = super().write_data(dataclasses.replace(plan, items=items, storage_data=prefix), planner)
                    results += written.wait()
        except Exception as error:
            # The serializer reports a full disk as its own failed write, and the cause is lost on the way between
            # processes.
            raise OSError(_with_causes(error)) from None
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(results)
        return done


class _AligningFileSystem(FileSystem):
    """Files in which every tensor begins at a multiple of 64 bytes, as its numbers do within the archive of
    torch.save."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            yield _AligningStream(stream) if mode == "wb" else stream  # type: ignore[misc]


class _AligningStream:
    """A file that is written to. The library calls `tell` before and after each tensor, so a second call without a
    write in between is the beginning of a tensor, and is given an aligned place."""

    def __init__(self, file: Any) -> None:
        self._file, self._is_between = file, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        self._is_between = False
        return int(self._file.write(data))

    def tell(self) -> int:
        place = int(self._file.tell())
        if self._is_between and place % _ALIGNMENT:
            place += self._file.write(bytes(-place % _ALIGNMENT))
        self._is_between = True
        return place


def _with_causes(error: BaseException) -> str:
    lines = []
    cause: BaseException | None = error
    while cause is not None:
        lines.append(_first_line(cause))
        cause = cause.__cause__ or cause.__context__
    return ", from ".join(lines)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _finish_own_files(partial: Path, documents: dict[str, bytes], ranks: Ranks) -> ManifestEntries:
    """Sync and describe what this process has written; the first process adds the documents and the format's index."""
    mine = list(partial.glob(f"__{ranks.rank}_*"))
    if ranks.is_first:
        for name, content in documents.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            mine.append(path)
        mine.append(partial / ".metadata")
    return manifest_entries(partial, mine)


def _publish(partial: Path, final: Path, step: int, entries: ManifestEntries) -> None:
    """Give a written checkpoint its name; an older one of that name is moved aside first, and removed later."""
    write_manifest(partial, entries)
    replaced = final.with_name(hidden_name(step, "replaced"))
    if os.path.lexists(final):
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(final)
        raise
    sync(final.parent)


class BackgroundSave:
    """One save at a time in the background: a thread copies the tensors to host memory, then writes the copies.

    The host memory is kept for the next save; it is as large as the process' part of the state.
    """

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        # not the DefaultStager around it: in PyTorch 2.11 that one can stage only once
        self._stager = StateDictStager(pin_memory=on_gpu)
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._staged: Future[None] | None = None
        self._saved: Future[Any] | None = None

    @property
    def is_running(self) -> bool:
        return self._saved is not None and not self._saved.done()

    def start(
        self,
        tensors: Callable[[], dict[str, Tensor]],
        changed_by_forward: set[str],
        write: Callable[[Callable[[], dict[str, Tensor]]], Any],
    ) -> None:
        """Call `write` on another thread, with a function that copies the tensors there. No save may be running.

        Every failure is raised inside `write`, which reports it to the other processes.

        Args:
            changed_by_forward: names of tensors that the next forward pass writes to; they are copied now. The others
                must not change before `wait_until_copied` returns.
        """
        assert not self.is_running
        self._staged, self._saved = Future(), Future()
        staged = self._staged
        try:
            originals = {name: t.detach().clone() if name in changed_by_forward else t for name, t in tensors().items()}
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
            copy = functools.partial(self._copy, originals, staged)
        except Exception as error:
            copy = functools.partial(_raise, error)
        # a daemon, so that the interpreter can exit while the thread waits for a lost process
        arguments = (copy, write, staged, self._saved)
        threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True).start()

    def _copy(self, originals: dict[str, Tensor], staged: Future[None]) -> dict[str, Tensor]:
        try:
            with torch.cuda.stream(self._stream):  # None: the current stream
                copies: dict[str, Tensor] = self._stager.stage(originals)
        finally:
            staged.set_result(None)
        return copies

    @staticmethod
    def _run(
        copy: Callable[[], dict[str, Tensor]],
        write: Callable[[Callable[[], dict[str, Tensor]]], Any],
        staged: Future[None],
        saved: Future[Any],
    ) -> None:
        try:
            saved.set_result(write(copy))
        except BaseException as error:
            saved.set_exception(error)
        finally:
            if not staged.done():
                staged.set_result(None)

    def wait_until_copied(self) -> None:
        """Wait until the tensors may change again. Call it before the optimizer's step."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def finish(self, timeout: float | None = None) -> Any:
        """Wait for the save that is running, if any.

        Returns:
            What `write` returned, or None if nothing was running.
        Raises:
            TimeoutError: the save has not ended within `timeout` seconds.
            CheckpointSaveError and others: raised by `write`.
        """
        if self._saved is None:
            return None
        result = self._saved.result(timeout)
        self._saved = None
        return result


def _raise(error: Exception) -> Any:
    raise error
