"""Local files as chunks of records: JSONL (plain, gzip, zstd), Parquet, plain text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from titan_peer.common.errors import TransientError, UserError, is_transient, os_failure
from titan_peer.data.local_files import suffix_of
from titan_peer.data.records import BYTE_ORDER_MARK, BadDocument, Divisible, RecordReader

_MAX_CHUNK_BYTES = 2**20
_SAMPLE_BYTES, _HEAD_BYTES = 2**20, 2**12


def open_file(path: Path, reader: RecordReader, key: str) -> Divisible:
    """Open a file with the reader for its suffix.

    Raises:
        UserError: the file cannot be opened, a library for its format is missing, or it is JSON but not JSONL.
    """
    try:
        suffix = suffix_of(path)
        if suffix == ".txt":
            return TextFile(path, reader)
        if suffix == ".parquet":
            return ParquetFile(path, reader, key)
        compressed = suffix.endswith((".gz", ".zst"))
        lines = CompressedJsonLines(path, reader, key) if compressed else JsonLines(path, reader)
        _require_lines(lines.head, path, key)
        return lines
    except OSError as error:
        raise os_failure(f"{key}: {path}: cannot be read", error) from None


def _require_lines(head: bytes, path: Path, key: str) -> None:
    """Raise UserError if a file that begins with `head` is one JSON array, or one object over several lines."""
    head = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if head[:1] == b"[" and head[1:].lstrip()[:1] == b"{":
        what, each = "one JSON array", "for r in json.load(sys.stdin)"
    elif head.split(b"\n", 1)[0].strip() == b"{":
        what, each = "one JSON object over several lines", "for r in [json.load(sys.stdin)]"
    else:
        return
    command = f'python -c "import json, sys; [print(json.dumps(r)) {each}]"'
    raise UserError(
        f"{key}: {path}: is {what}, but must have one object per line; this converts it: "
        f"{command} < {path.name} > {path.name.split('.')[0]}.jsonl"
    )


def import_pyarrow(path: Path, key: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{key}: {path}: needs pyarrow; install it with: pip install 'titan_peer[data]'") from None
    return pyarrow


def _unread(where: str, what: str, error: Exception) -> BadDocument:
    """What to say of a document that `error` stands in the way of.

    Raises:
        TransientError: it is not the document's fault: another time it may be read.
    """
    why = getattr(error, "strerror", None) or error
    if is_transient(error):
        raise TransientError(f"{where}: cannot be read: {why}")
    return BadDocument(where, f"{what}: {why}")


class TextFile:
    """A file of plain text: one document."""

    kind: Literal["text", "records", "tokens"] = "text"
    num_chunks = 1

    def __init__(self, path: Path, reader: RecordReader) -> None:
        self.path, self.reader, self.size = path, reader, path.stat().st_size

    @property
    def files(self) -> Sequence[Path]:
        return (self.path,)

    def approximate_documents(self) -> float:
        return 1

    def divide(self, num_chunks: int) -> None:
        pass

    def records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        if start > 0:
            return
        where = str(self.path)
        if self.size > self.reader.max_bytes:
            yield self.reader.too_large(self.size, where)
            return
        try:
            yield self.reader.from_text(self.path.read_text(encoding="utf-8-sig"), where)
        except UnicodeDecodeError as error:
            yield BadDocument(where, f"is not UTF-8 ({error.reason} at byte {error.start})")
        except OSError as error:
            yield _unread(where, "cannot be read", error)


def _read_line(file: IO[bytes], limit: int) -> tuple[bytes, int]:
    """The next line, cut off after `limit` bytes, and its full length: a huge line is skipped, not held in memory."""
    line = file.readline(limit + 1)
    length = len(line)
    if length > limit and not line.endswith(b"\n"):
        while rest := file.readline(_MAX_CHUNK_BYTES):
            length += len(rest)
            if rest.endswith(b"\n"):
                break
    return line, length


def _is_blank(line: bytes) -> bool:
    return line.isspace() or (line.startswith(BYTE_ORDER_MARK) and not line[len(BYTE_ORDER_MARK) :].strip())


class JsonLines:
    """A plain JSONL file; a chunk is a range of bytes and owns the lines that begin in it, so no index is needed."""

    kind: Literal["text", "records", "tokens"] = "records"

    def __init__(self, path: Path, reader: RecordReader) -> None:
        self.path, self.reader, self.size = path, reader, path.stat().st_size
        with path.open("rb") as file:
            sample = file.read(_SAMPLE_BYTES)
        self.head, self._sample = sample[:_HEAD_BYTES], sample.count(b"\n")
        self.divide(1)

    @property
    def files(self) -> Sequence[Path]:
        return (self.path,)

    def approximate_documents(self) -> float:
        return max(self._sample, 1) * max(self.size / _SAMPLE_BYTES, 1)

    def divide(self, num_chunks: int) -> None:
        self.chunk_bytes = min(max(-(-self.size // num_chunks), 1), _MAX_CHUNK_BYTES)

    @property
    def num_chunks(self) -> int:
        return max(-(-self.size // self.chunk_bytes), 1)

    def records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        try:
            yield from self._records(chunk, start)
        except OSError as error:
            yield _unread(str(self.path), "cannot be read", error)

    def _records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        position, end = chunk * self.chunk_bytes, min((chunk + 1) * self.chunk_bytes, self.size)
        with self.path.open("rb") as file:
            if position > 0:  # go to the first line that begins in this chunk, if there is one
                file.seek(position - 1)
                rest = file.readline(end - position + 1)
                if not rest.endswith(b"\n"):
                    return
                position += len(rest) - 1
            number = 0
            while position < end:
                line, length = _read_line(file, self.reader.max_bytes)
                if not length:  # the file has become shorter
                    return
                if not _is_blank(line):
                    if number >= start:
                        yield self._record(line, length, position)
                    number += 1
                position += length

    def _record(self, line: bytes, length: int, position: int) -> str | BadDocument:
        if length > self.reader.max_bytes:
            document: str | BadDocument = self.reader.too_large(length, "")
        else:
            document = self.reader.from_json(line, "")
        if isinstance(document, BadDocument):  # counting its line number reads the file, so only now
            return BadDocument(f"{self.path}:{self._line_number(position)}", document.reason)
        return document

    def _line_number(self, position: int) -> int:
        number = 1
        with self.path.open("rb") as file:
            while position > 0 and (block := file.read(min(position, _MAX_CHUNK_BYTES))):
                number += block.count(b"\n")
                position -= len(block)
        return number


class CompressedJsonLines:
    """JSONL in gzip or zstd. It can be read only from its beginning, so chunk i of n is every n-th line from the i-th
    on."""

    # Web text compresses to about a third of its size; only the number of streams depends on this estimate.
    _RATIO = 3
    kind: Literal["text", "records", "tokens"] = "records"

    def __init__(self, path: Path, reader: RecordReader, key: str) -> None:
        self.path, self.reader, self.size = path, reader, path.stat().st_size
        self.num_chunks = 1
        if path.name.endswith(".zst"):
            self._pyarrow = import_pyarrow(path, key)
        self.head = b""
        self._documents = 0.0
        sampled, lines = 0, 0
        try:
            with self._open() as file:
                sample = file.read(_SAMPLE_BYTES)
            self.head, sampled, lines = sample[:_HEAD_BYTES], len(sample), sample.count(b"\n")
        except (EOFError, OSError, zlib.error) as error:
            _unread(f"{key}: {path}", "is damaged", error)  # else reading its records reports it
        self._documents = max(lines, 1) * max(self._RATIO * self.size / max(sampled, 1), 1)

    @property
    def files(self) -> Sequence[Path]:
        return (self.path,)

    def approximate_documents(self) -> float:
        return self._documents

    def divide(self, num_chunks: int) -> None:
        # Each chunk decompresses the whole file, so there are no more chunks than streams to read them.
        self.num_chunks = -(-num_chunks // 16)

    def _open(self) -> IO[bytes]:
        if self.path.name.endswith(".gz"):
            return cast(IO[bytes], gzip.open(self.path, "rb"))
        # pyarrow, unlike zstandard, distinguishes a truncated file from a complete one
        return io.BufferedReader(self._pyarrow.input_stream(str(self.path), compression="zstd"), 2**18)

    def records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        number, line_number = -1, 0
        try:
            with self._open() as file:
                while True:
                    line, length = _read_line(file, self.reader.max_bytes)
                    if not length:
                        return
                    line_number += 1
                    if _is_blank(line):
                        continue
                    number += 1
                    if number % self.num_chunks != chunk or number // self.num_chunks < start:
                        continue
                    where = f"{self.path}:{line_number}"
                    if length > self.reader.max_bytes:
                        yield self.reader.too_large(length, where)
                    else:
                        yield self.reader.from_json(line, where)
        except (EOFError, OSError, zlib.error) as error:
            where = f"{self.path}:{line_number + 1}"
            yield _unread(where, "the file is damaged or cut off from here on", error)


class ParquetFile:
    """A Parquet file; a chunk is a row group or a part of a large one."""

    kind: Literal["text", "records", "tokens"] = "records"

    def __init__(self, path: Path, reader: RecordReader, key: str) -> None:
        self.path, self.reader = path, reader
        self._pyarrow = import_pyarrow(path, key)
        self.damage = ""
        self._groups: list[int] = []
        try:
            with self._open() as file:
                metadata = file.metadata
                self._groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
                self._columns = [c for c in reader.columns if c in file.schema_arrow.names]
        except (self._pyarrow.ArrowInvalid, self._pyarrow.ArrowException, OSError) as error:
            self.damage = _unread(f"{key}: {path}", "is not a complete Parquet file", error).reason
        self.size = sum(self._groups)
        self.divide(1)

    def _open(self) -> Any:
        return self._pyarrow.parquet.ParquetFile(self.path)

    @property
    def files(self) -> Sequence[Path]:
        return (self.path,)

    def approximate_documents(self) -> float:
        return self.size

    def divide(self, num_chunks: int) -> None:
        """Chunks (row group, first row, end row)."""
        rows = max(-(-self.size // num_chunks), 1)
        self._chunks: list[tuple[int, int, int]] = []
        for group, length in enumerate(self._groups):
            parts = max(round(length / rows), 1)
            bounds = [length * i // parts for i in range(parts + 1)]
            self._chunks += [(group, a, b) for a, b in zip(bounds, bounds[1:])]

    @property
    def num_chunks(self) -> int:
        return max(len(self._chunks), 1)

    def records(self, chunk: int, start: int) -> Iterator[str | BadDocument]:
        if self.damage:
            if start == 0:
                yield BadDocument(str(self.path), self.damage)
            return
        if not self._chunks:
            return
        group, first, end = self._chunks[chunk]
        row, wanted, offset = 0, first + start, sum(self._groups[:group])
        try:
            with self._open() as file:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=self._columns):
                    skipped = min(max(wanted - row, 0), len(batch))
                    for i, record in enumerate(batch.slice(skipped).to_pylist(), row + skipped):
                        if i >= end:
                            return
                        yield self.reader.from_mapping(record, f"{self.path}: row {offset + i}")
                    row += len(batch)
        except (self._pyarrow.ArrowException, OSError) as error:
            where = f"{self.path}: row {offset + max(row, wanted)}"
            yield _unread(where, "the row group is damaged from here on", error)
