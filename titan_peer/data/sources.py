"""Where documents come from: a job describes a source in a `DataSource` (config/data_source.py), and `Source` reads it.

A source is cut into chunks that can each be read without reading the others (a stretch of a JSONL file, a row group of
a Parquet file, a shard of a Hugging Face dataset), so that streams share a source and resume in its middle without
reading what came before.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource, source_name
from titan_peer.data import formats, hub, tokenized
from titan_peer.data.identity import identity_of
from titan_peer.data.local_files import SUFFIXES, local_files
from titan_peer.data.records import DOCUMENTS_PER_STREAM, BadDocument, Divisible, RecordReader, TokenizedText

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

MAX_STREAMS = 8


def _is_hub_id(path: str) -> bool:
    """Whether a path can only be a dataset's name: not a data file's name, and not in a folder that exists."""
    is_local = (
        path.lower().endswith(SUFFIXES)
        or Path(path).exists()
        or (Path(path).parent != Path() and Path(path).parent.is_dir())
    )
    return _HUB_ID.fullmatch(path) is not None and not is_local


def _open_parts(source: DataSource, key: str, retries: int) -> Sequence[Divisible]:
    reader = RecordReader(source.text_key, source.template, source.max_document_bytes, key)
    if tokenized.is_tokenized(source.path):
        return tokenized.open_shards(Path(source.path), key)
    if _is_hub_id(source.path):
        return hub.open_dataset(source.path, source.subset, source.split, source.streaming, reader, key, retries)
    return [formats.open_file(path, reader, key) for path in local_files(source, key)]


class Source:
    """Reads one source of a job.

    Args:
        key: the place in the job file, such as "data.sources[0]", for error messages.
        retries: how often a request is repeated after a network error.
    Raises:
        UserError: nothing matches the path, or it cannot be opened.
    """

    def __init__(self, config: DataSource, key: str, retries: int = 5) -> None:
        self.config, self.key, self.name = config, key, source_name(config)
        self.parts = _open_parts(config, key, retries)
        # From the name alone, so that adding or removing a source leaves the order of the others unchanged.
        self.seed = zlib.crc32(self.name.encode())

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that made the documents' tokens; None for text."""
        return getattr(self.parts[0], "tokenizer_fingerprint", None)

    def sensible_streams(self, readers: int = 1) -> int:
        """How many streams can read it with enough documents for each.

        A power of two up to MAX_STREAMS, so that the order is the same for any number of readers up to that; with more
        readers, one stream per reader.
        """
        streams, documents = 1, sum(part.approximate_documents() for part in self.parts)
        if readers > MAX_STREAMS and documents >= readers * DOCUMENTS_PER_STREAM:
            return readers
        while streams < MAX_STREAMS and documents >= 2 * streams * DOCUMENTS_PER_STREAM:
            streams *= 2
        return streams

    def divide(self, num_streams: int) -> None:
        """Cut the source into enough chunks for each of `num_streams` streams to get about the same amount."""
        wanted = 16 * num_streams
        total = sum(part.size for part in self.parts)
        for part in self.parts:
            part.divide(max(-(-wanted * part.size // max(total, 1)), 1))
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._ends = np.cumsum([part.num_chunks for part in self.parts])

    @property
    def num_chunks(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Its content and how it is read (`identity_of`), computed at the first access."""
        return identity_of(self.config, self.parts, self.key)

    def fingerprint(self) -> str:
        """Changes when the source is cut into other chunks: saved places in it are then invalid."""
        described = ",".join(f"{part.size}/{part.num_chunks}" for part in self.parts)
        return f"{zlib.crc32(described.encode()):08x}"

    def reorder(self, seed: int) -> None:
        """Order the chunks by `seed`, in place of the seed made from the name."""
        self.seed = seed
        self._orders = {}

    def order(self, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
        """The chunks in the order of an epoch."""
        if not shuffle:
            return np.arange(self.num_chunks)
        if (seed, epoch) not in self._orders:
            if len(self._orders) > 1:  # streams are in one epoch or the next
                self._orders.pop(min(self._orders))
            rng = np.random.default_rng([seed, self.seed, epoch])
            self._orders[seed, epoch] = rng.permutation(self.num_chunks)
        return self._orders[seed, epoch]

    def records(self, chunk: int, start: int = 0) -> Iterator[str | TokenizedText | BadDocument]:
        part = int(np.searchsorted(self._ends, chunk, side="right"))
        first = int(self._ends[part]) - self.parts[part].num_chunks
        return self.parts[part].records(chunk - first, start)

    def require_documents(self) -> None:
        """Raise UserError unless there is at least one good document (or, under "error", if the first is bad)."""
        first_bad: BadDocument | None = None
        for chunk in range(self.num_chunks):
            for record in self.records(chunk):
                if not isinstance(record, BadDocument):
                    return
                if self.config.on_bad_document == "error":
                    raise self.refusal(record)
                first_bad = first_bad or record
        why = f"all its documents are bad, the first is {first_bad}" if first_bad else "it has no documents"
        raise UserError(f"{self.key}.path = {self.config.path}: {why}")

    def refusal(self, bad: BadDocument) -> UserError:
        return UserError(f'{self.key}: {bad}; {self.key}.on_bad_document = "skip" leaves such documents out')


def open_sources(
    configs: Sequence[DataSource], section: str, num_streams: int = 0, retries: int = 5, readers: int = 1
) -> tuple[list[Source], int]:
    """All sources of a section, ready to be read, and the number of streams that read them.

    Args:
        num_streams: 0: chosen from the number of documents.
        readers: processes x workers that share the streams.
    Raises:
        UserError: one cannot be opened, has no good document, or two have the same name.
    """
    names = [source_name(c) for c in configs]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(
                f"{section}.sources[{i}].name = {name!r}: is already the name of sources[{names.index(name)}]; "
                "give each source its own name"
            )
    sources = [Source(config, f"{section}.sources[{i}]", retries) for i, config in enumerate(configs)]
    num_streams = num_streams or min(source.sensible_streams(readers) for source in sources)
    for source in sources:
        source.divide(num_streams)
        source.require_documents()
    return sources, num_streams


def open_source(config: DataSource, key: str) -> Source:
    """One source, ready to be read by one stream.

    Raises:
        UserError: it cannot be opened or has no good document.
    """
    source = Source(config, key)
    source.divide(1)
    source.require_documents()
    return source
