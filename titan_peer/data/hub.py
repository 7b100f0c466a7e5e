"""Hugging Face datasets as chunks of records, streamed shard by shard or downloaded, with retries on the network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from titan_peer.common.errors import TransientError, UserError, is_transient
from titan_peer.data.records import DOCUMENTS_PER_STREAM, BadDocument, Divisible, RecordReader

logger = logging.getLogger("titan_peer")

T = TypeVar("T")

_ROWS_AT_A_TIME = 256
# An error of one of these libraries that carries no response from a server is a connection error.
_NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


def with_retries(request: Callable[[], T], what: str, retries: int) -> T:
    """The result of `request()`, repeated after network errors with pauses that double; the last error is raised."""
    for attempt in range(retries + 1):
        try:
            return request()
        except Exception as error:
            if attempt == retries or not _is_network_error(error):
                raise
            _pause(what, error, attempt, retries)
    raise AssertionError("unreachable")


def _pause(what: str, error: Exception, failures: int, retries: int) -> None:
    """Say that a request failed and wait: 1, 2, 4 ... seconds."""
    seconds = min(FIRST_PAUSE * 2**failures, _LONGEST_PAUSE)
    why = f"{type(error).__name__}: {error}"
    logger.warning("%s: failed (%s); try %d of %d in %.3g s", what, why, failures + 2, retries + 1, seconds)
    time.sleep(seconds)


def _is_network_error(error: BaseException) -> bool:
    """Whether trying again may help: for connection errors, timeouts and overloaded servers, not for a missing
    dataset."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status == 429 or status >= 500
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return True
        if type(cause).__module__.split(".")[0] in _NETWORK_LIBRARIES:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def open_dataset(
    path: str, subset: str, split: str, streaming: bool, reader: RecordReader, key: str, retries: int
) -> list[Divisible]:
    """The shards of a split.

    Raises:
        UserError: the library is missing, or the dataset, subset, split or column does not exist.
        TransientError: the network failed at every try.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{key}.path = {path}: is not a local file or folder; to read it as a Hugging Face dataset install the library: "
            "pip install 'titan_peer[data]'"
        ) from None
    logger.info("%s.path = %s: is not a local file or folder; opening the Hugging Face dataset of that name", key, path)
    try:
        dataset = with_retries(
            lambda: datasets.load_dataset(path, subset or None, split=split, streaming=streaming),
            f"{key}: opening {path}",
            0 if datasets.config.HF_HUB_OFFLINE else retries,  # offline by the user's own setting
        )
    except Exception as error:
        shown = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        failure = UserError if datasets.config.HF_HUB_OFFLINE or not _is_network_error(error) else TransientError
        raise failure(
            f"{key}.path = {path} (subset {subset or 'none'}, split {split}): is not a local file or folder, and cannot be "
            f"opened as a Hugging Face dataset: {shown}"
        ) from None
    if dataset.column_names is not None:
        missing = [c for c in reader.columns if c not in dataset.column_names]
        if missing:
            raise UserError(
                f"{key}: {path} has no column {missing[0]!r}; its columns: {', '.join(dataset.column_names)}"
            )
        dataset = dataset.select_columns(reader.columns)
    if not streaming:
        return [DownloadedDataset(dataset, reader, path)]
    return [StreamedShard(dataset, i, reader, f"{path} shard {i}", retries) for i in range(dataset.num_shards)]


class DownloadedDataset:
    """A split on disk, memory-mapped: any row can be read directly."""

    kind: Literal["text", "records", "tokens"] = "records"
    files: Sequence[Path] = ()

    def __init__(self, dataset: Any, reader: RecordReader, name: str) -> None:
        self.dataset, self.reader, self.name, self.size = dataset, reader, name, len(dataset)
        self.divide(1)

    def approximate_documents(self) -> float:
        return self.size

    def divide(self, num_chunks: int) -> None:
        self.rows = max(min(-(-self.size // num_chunks), 1024), 1)

    @property
    def num_chunks(self) -> int:
        return max(-(-self.size // self.rows), 1)

    def records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        first, end = chunk * self.rows + start, min((chunk + 1) * self.rows, self.size)
        for row, record in enumerate(self.dataset.select(range(first, end)) if first < end else (), first):
            yield self.reader.from_mapping(record, f"{self.name}: row {row}")


class StreamedShard:
    """One shard of a streamed split. Rows can be read only in order, so a resume goes through the shard's earlier
    rows."""

    kind: Literal["text", "records", "tokens"] = "records"
    files: Sequence[Path] = ()

    def __init__(self, dataset: Any, index: int, reader: RecordReader, name: str, retries: int) -> None:
        self.dataset, self.index, self.reader, self.name, self.retries = dataset, index, reader, name, retries
        self.size = 1
        self.num_chunks = 1

    def approximate_documents(self) -> float:
        """Enough for one stream: a second one would read the whole shard over the network again."""
        return DOCUMENTS_PER_STREAM

    def divide(self, num_chunks: int) -> None:
        # Every chunk reads the whole shard again, which is worth it only if there are fewer shards than streams.
        self.num_chunks = -(-num_chunks // 16)

    def records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        done, failures = start, 0
        while True:
            try:
                for row, record in self._rows(chunk, done):
                    done, failures = done + 1, 0
                    yield self.reader.from_mapping(record, f"{self.name}: row {row}")
                return
            except Exception as error:
                if failures == self.retries or not _is_network_error(error):
                    failure = TransientError if _is_network_error(error) or is_transient(error) else UserError
                    raise failure(f"{self.name}: cannot be read: {type(error).__name__}: {error}") from None
                _pause(self.name, error, failures, self.retries)
                failures += 1

    def _rows(self, chunk: int, done: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row in the shard, record) for the chunk's records from the `done`-th on."""
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.index)
        first = 0
        for table in shard.with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
            rows = [r for r in range(first, first + len(table)) if r % self.num_chunks == chunk]
            rows = [r for r in rows if r // self.num_chunks >= done]
            if rows:  # tables from before the resume are skipped without converting them to Python
                yield from zip(rows, table.take([r - first for r in rows]).to_pylist())
            first += len(table)
