"""Writing one checkpoint with all processes of a job, whole or not at all, on the training thread or beside it.

Every stage ends with an exchange of results, so that a full disk on one process is a failed save on all of them and
nobody waits for somebody who has given up.
"""

from __future__ import annotations

import datetime
import logging
import re
import shutil
import threading
from collections.abc import Callable
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

from titan_peer.checkpoint_files import (
    ManifestEntries,
    manifest_entries,
    saved_steps,
    sync,
    write_manifest,
)
from titan_peer.collectives import new_gloo_group

logger = logging.getLogger("titan_peer")

T = TypeVar("T")

_LEFTOVER = re.compile(r"\.step-\d+\.(partial|removed)")
# A process may have much more to write than another; a process that has died is noticed at once all the same.
_SLOWEST_WRITER = datetime.timedelta(minutes=30)


class CheckpointSaveError(Exception):
    """A checkpoint could not be written; what was saved before is as it was."""


class Ranks:
    """The processes of a job as savers and loaders see them, with a gloo group that training does not use."""

    def __init__(self) -> None:
        self.is_alone = not dist.is_initialized()
        self.group = None if self.is_alone else new_gloo_group(_SLOWEST_WRITER)
        self.rank = 0 if self.is_alone else dist.get_rank()
        self.size = 1 if self.is_alone else dist.get_world_size()
        self.is_first = self.rank == 0

    def all_do(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every process; all get everyone's results.

        Raises:
            CheckpointSaveError: on every process, when the action raised OSError on any; the message names ranks and causes.
        """
        result: tuple[T | None, str]
        try:
            result = (action(), "")
        except OSError as error:
            result = (None, str(error))
        everyone: list[Any] = [result]
        if not self.is_alone:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, result, group=self.group)
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
        if failures:
            raise CheckpointSaveError("; ".join(failures))
        return [value for value, _ in everyone]

    def first_does(self, action: Callable[[], T]) -> T:
        """Run `action` on the first process; all get its result, or CheckpointSaveError."""
        results = self.all_do(lambda: action() if self.is_first else None)
        return results[0]  # type: ignore[return-value]


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], documents: dict[str, bytes], ranks: Ranks
) -> Path:
    """Write `folder/step-N`: this process' parts of `tensors` and, by the first process, `documents` by file name.

    Returns:
        The complete checkpoint's folder, on every process.
    Raises:
        CheckpointSaveError: on every process; nothing of the attempt is left, and nothing saved before is touched.
    """
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    try:
        ranks.first_does(lambda: _prepare(partial))
        _write_tensors(partial, tensors, ranks)
        shares = ranks.all_do(lambda: _finish_own_files(partial, documents, ranks))
        entries = {name: entry for share in shares for name, entry in share.items()}
        ranks.first_does(lambda: _publish(partial, final, entries))
    except CheckpointSaveError:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)  # its space may be what is missing
        raise
    return final


def _prepare(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (p for p in partial.parent.glob(".step-*") if _LEFTOVER.fullmatch(p.name)):
        shutil.rmtree(leftover)
    partial.mkdir()


def _write_tensors(partial: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    try:
        writer = _Writer(partial, sync_files=False)
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.is_alone)
    except CheckpointException as error:
        causes = (f"rank {rank}: {_first_line(cause)}" for rank, (cause, _) in error.failures.items())
        raise CheckpointSaveError("; ".join(causes)) from None


class _Writer(FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            # The serializer reports a full disk as a failed write of its own, and what it came from is lost between processes.
            raise OSError(_with_causes(error)) from None


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
    """Sync and describe what this process has written; the first one adds the documents and the format's index."""
    mine = list(partial.glob(f"__{ranks.rank}_*"))
    if ranks.is_first:
        for name, content in documents.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            mine.append(path)
        mine.append(partial / ".metadata")
    return manifest_entries(partial, mine)


def _publish(partial: Path, final: Path, entries: ManifestEntries) -> None:
    write_manifest(partial, entries)
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    sync(final.parent)


def remove_checkpoint(folder: Path) -> None:
    """Remove `step-N`. Hidden first, so that a kill on the way leaves no half checkpoint under a visible name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def drop_old(folder: Path, step: int, keep_latest_k: int, keep_every_n_steps: int) -> None:
    """Remove the checkpoints up to `step` beyond the newest k; multiples of n stay (0: all that are not among the k go)."""
    steps = [s for s in saved_steps(folder) if s <= step]
    for old in steps[:-keep_latest_k] if keep_latest_k else []:
        if not (keep_every_n_steps and old % keep_every_n_steps == 0):
            remove_checkpoint(folder / f"step-{old}")


class BackgroundSave:
    """One save at a time beside the training: a thread copies the tensors to host memory, then writes the copies.

    The host memory is kept and used again by the next save; it is as large as the process' part of the state.
    """

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        # not the DefaultStager around it: that of PyTorch 2.11 can stage once only
        self._stager = StateDictStager(pin_memory=on_gpu)
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._staged: Future[None] | None = None
        self._saved: Future[Any] | None = None

    @property
    def is_running(self) -> bool:
        return self._saved is not None and not self._saved.done()

    def start(
        self, tensors: dict[str, Tensor], changed_by_forward: set[str], write: Callable[[dict[str, Tensor]], Any]
    ) -> None:
        """Copy `tensors` and call `write` with the copies, both on another thread. None may be running.

        Args:
            changed_by_forward: names of tensors that the next forward pass writes to; they are copied now. The others
                must not change before `wait_until_copied` returns.
        """
        assert not self.is_running
        tensors = {name: t.detach().clone() if name in changed_by_forward else t for name, t in tensors.items()}
        self._staged, self._saved = Future(), Future()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        # a daemon: where a lost process keeps it waiting, the interpreter must be able to end
        arguments = (tensors, write, self._staged, self._saved)
        threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True).start()

    def _run(
        self,
        tensors: dict[str, Tensor],
        write: Callable[[dict[str, Tensor]], Any],
        staged: Future[None],
        saved: Future[Any],
    ) -> None:
        try:
            try:
                with torch.cuda.stream(self._stream):  # None: nothing
                    copies: Any = self._stager.stage(tensors)
            finally:
                staged.set_result(None)
            saved.set_result(write(copies))
        except BaseException as error:
            saved.set_exception(error)

    def wait_until_copied(self) -> None:
        """Return when the tensors may change again. Call before the optimizer's step."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def finish(self, timeout: float | None = None) -> Any:
        """Wait for the save that is running, if any.

        Returns:
            What `write` returned, or None where nothing was running.
        Raises:
            TimeoutError: it has not ended within `timeout` seconds; CheckpointSaveError and others: what `write` raised.
        """
        if self._saved is None:
            return None
        result = self._saved.result(timeout)
        self._saved = None
        return result
