"""Documents that were tokenised in advance: shards of memory-mapped token ids, written by `titan-peer data tokenize`.

A folder holds `tokenized.json` (tokenizer, dtype, the shards) and for each shard `shard-N.tokens` (the ids of all its
documents, one after the other, without begin and end tokens), `shard-N.ends.npy` (where each document ends) and
`shard-N.bytes.npy` (how many UTF-8 bytes its text has).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from titan_peer.common.errors import UserError, os_failure
from titan_peer.data.records import BadDocument, Divisible, TokenizedText

MANIFEST = "tokenized.json"
_DTYPES: dict[str, type[np.unsignedinteger[Any]]] = {"uint16": np.uint16, "uint32": np.uint32}
_DOCUMENTS_PER_CHUNK = 1024


def is_tokenized(path: str) -> bool:
    return (Path(path) / MANIFEST).is_file()


def dtype_for(vocab_size: int) -> str:
    """The smallest dtype that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _stored(ids: NDArray[np.int32], dtype: str) -> NDArray[Any]:
    """Ids in the stored dtype; checked, since a cast alone would turn ids that do not fit into other ids."""
    if len(ids) and not 0 <= ids.min() <= ids.max() <= np.iinfo(_DTYPES[dtype]).max:
        raise UserError(f"the tokenizer gave the ids {ids.min()} to {ids.max()}, which do not fit into {dtype}")
    return ids.astype(_DTYPES[dtype])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        UserError: it is damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _ = _DTYPES[manifest["dtype"]], manifest["tokenizer"], manifest["shards"]
    except OSError as error:
        raise os_failure(f"{folder / MANIFEST}: cannot be read", error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: is damaged ({type(error).__name__}: {error})") from None
    return manifest


def _sync(file: IO[bytes]) -> None:
    """Write the file to disk before a manifest lists it."""
    file.flush()
    os.fsync(file.fileno())


def write_shard(folder: Path, name: str, documents: Sequence[TokenizedText], dtype: str) -> dict[str, Any]:
    """Write the files of a shard; returns its entry for the manifest."""
    lengths = np.array([len(d.ids) for d in documents], dtype=np.int64)
    with (folder / f"{name}.tokens").open("wb") as file:
        for document in documents:
            file.write(_stored(document.ids, dtype).tobytes())
        _sync(file)
    num_bytes = np.array([d.num_bytes for d in documents], dtype=np.int64)
    for kind, array in (("ends", np.cumsum(lengths)), ("bytes", num_bytes)):
        with (folder / f"{name}.{kind}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    return {"name": name, "documents": len(documents), "tokens": int(lengths.sum())}


def open_shards(folder: Path, key: str) -> list[Divisible]:
    """The shards of a tokenised folder.

    Raises:
        UserError: the manifest or a shard is damaged, or tokenising was not finished.
    """
    manifest = read_manifest(folder)
    if not manifest.get("complete", False):
        raise UserError(
            f"{key}.path = {folder}: tokenising was interrupted; repeat the `titan-peer data tokenize` command to finish it"
        )
    return [
        TokenizedShard(folder, entry, manifest["dtype"], manifest["tokenizer"], key) for entry in manifest["shards"]
    ]


class TokenizedShard:
    """One shard, memory-mapped: any document can be read directly."""

    kind: Literal["text", "records", "tokens"] = "tokens"

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: str, tokenizer_fingerprint: str, key: str) -> None:
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.files = [folder / f"{entry['name']}.{suffix}" for suffix in ("tokens", "ends.npy", "bytes.npy")]
        self.path = self.files[0]
        try:
            self.ends, self.bytes = (np.load(file, mmap_mode="r", allow_pickle=False) for file in self.files[1:])
            empty = self.path.stat().st_size == 0
            tokens = np.empty(0, _DTYPES[dtype]) if empty else np.memmap(self.path, dtype=_DTYPES[dtype], mode="r")
        except OSError as error:
            raise os_failure(f"{key}: {self.path}: cannot be read", error) from None
        except ValueError as error:
            raise UserError(f"{key}: {self.path}: cannot be read: {error}") from None
        self.tokens = tokens
        self._vocab_size = 2**31
        self.size = entry["documents"]
        whole = len(self.ends) == len(self.bytes) == self.size and len(tokens) == entry["tokens"]
        if not whole or (self.size and self.ends[-1] != len(tokens)):
            raise UserError(f"{key}: {self.path}: is damaged: it has {len(tokens):,} tokens, not {entry['tokens']:,}")
        self.divide(1)

    def require_vocabulary(self, vocab_size: int, key: str) -> None:
        """Treat ids of `vocab_size` or more as damage from now on.

        Raises:
            UserError: the stored dtype is too small for the vocabulary, so that larger ids were cut when it was
                written.
        """
        if vocab_size > np.iinfo(self.tokens.dtype).max + 1:
            raise UserError(
                f"{key}: {self.path}: holds ids as {self.tokens.dtype}, but the tokenizer has ids up to {vocab_size - 1:,}: "
                "tokenise it again"
            )
        self._vocab_size = vocab_size

    def approximate_documents(self) -> float:
        return self.size

    def divide(self, num_chunks: int) -> None:
        self.documents_per_chunk = max(min(-(-self.size // num_chunks), _DOCUMENTS_PER_CHUNK), 1)

    @property
    def num_chunks(self) -> int:
        return max(-(-self.size // self.documents_per_chunk), 1)

    def records(self, chunk: int, start: int) -> Iterator[TokenizedText | BadDocument]:
        first = chunk * self.documents_per_chunk
        for i in range(first + start, min(first + self.documents_per_chunk, self.size)):
            begin = int(self.ends[i - 1]) if i else 0
            ids = self.tokens[begin : int(self.ends[i])]
            if len(ids) and (largest := ids.max()) >= self._vocab_size:
                yield BadDocument(f"{self.path}: document {i}", f"is damaged: it has the id {largest:,}")
            else:
                yield TokenizedText(ids.astype(np.int32), int(self.bytes[i]))
