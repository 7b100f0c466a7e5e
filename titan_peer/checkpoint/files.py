"""A checkpoint folder on disk: its files, the manifest that shows that they are whole, and how to read them safely.

`step-N` holds tensors in torch.distributed.checkpoint's format (`.metadata`, `*.distcp`), `train_state.json` (step,
tokens, data position), `config.toml` (the resolved job), the files of its tokenizer in `tokenizer/` and, written last,
`manifest.json` with the size and CRC-32 of every other file.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import math
import mmap
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from titan_peer.checkpoint.folder import MANIFEST, TOKENIZER
from titan_peer.data.special_tokens import SETTINGS_FILES

logger = logging.getLogger("titan_peer")

# A single process is intended, but the library warns about it at every save and load. The filter stays for good: adding
# and removing one makes Python forget which warnings it has shown, and saves run on a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model")

_ZIP_LOCAL_HEADER = struct.Struct("<4s5H3L2H")

# errors of file systems that cannot sync folders
_FOLDERS_NOT_SYNCED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

ManifestEntries = dict[str, dict[str, int]]
"""File, relative to the checkpoint's folder -> {"bytes": size, "crc32": checksum}."""


class DamagedCheckpointError(Exception):
    """The files of a checkpoint folder differ from its manifest."""


# --------------------------------------------------------------------------------------------------------------------
# Manifest


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def sync(path: Path) -> None:
    """Flush a file's or folder's content to disk; a folder's only if the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_NOT_SYNCED or not path.is_dir():
            raise
        _say_once(
            f"the file system of the checkpoints cannot sync folders ({error.strerror}): if the machine fails right after a "
            "save, that save may be lost"
        )
    finally:
        os.close(descriptor)


@functools.cache
def _say_once(what: str) -> None:
    logger.warning(what)


def manifest_entries(folder: Path, paths: Iterable[Path]) -> ManifestEntries:
    """Sync files to disk and describe them for the manifest."""
    entries = {}
    for path in sorted(paths):
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    return entries


def write_manifest(folder: Path, entries: ManifestEntries) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    sync(manifest)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    sync(folder)


def verify(
    folder: Path, *, checksums: bool = True, share: slice = slice(None), without: Collection[str] = frozenset()
) -> None:
    """Raise DamagedCheckpointError unless every file exists with the size and CRC-32 of the manifest.

    Args:
        checksums: False compares sizes only, which reads nothing but the manifest.
        share: which files of the manifest's sorted list to check, so that processes can divide the work.
        without: files that are not checked.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = sorted((name, entry["bytes"], entry["crc32"]) for name, entry in files.items() if name not in without)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder / MANIFEST} cannot be read ({error})") from None
    for name, size, checksum in entries[share]:
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedCheckpointError(f"{path} has {found:,} bytes, its manifest says {size:,}")
            if checksums and _crc32(path) != checksum:
                raise DamagedCheckpointError(f"{path} has another CRC-32 than its manifest says")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from None


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer


def read_tokenizer_files(tokenizer_path: str) -> dict[str, bytes]:
    """Contents of the files of `model.tokenizer_path`, by name; empty for a tokenizer without files."""
    path = Path(tokenizer_path)
    if path.is_file():
        settings = [path.with_name(name) for name in SETTINGS_FILES] if path.name == "tokenizer.json" else []
        return {p.name: p.read_bytes() for p in [path, *settings] if p.is_file()}
    if not path.is_dir():
        return {}
    return {p.name: p.read_bytes() for pattern in _TOKENIZER_FILES for p in path.glob(pattern) if p.is_file()}


def stored_tokenizer_path(folder: Path, tokenizer_path: str) -> str:
    """Where a checkpoint stores the tokenizer whose path in its job is `tokenizer_path`."""
    stored = folder / TOKENIZER
    if not stored.is_dir():
        return tokenizer_path
    same_name = stored / Path(tokenizer_path).name
    return str(same_name if same_name.is_file() else stored)


# --------------------------------------------------------------------------------------------------------------------
# Tensors


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the checkpoint format's index; refuses every type that is not part of that format."""

    _ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise DamagedCheckpointError(f"its .metadata asks for {module}.{name}, which no checkpoint contains")


class SafeReader(FileSystemReader):
    """DCP's folder reader, except that its pickled index is read by an unpickler that allows only the format's
    types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = Path(self.path) / ".metadata"
        try:
            with index.open("rb") as file:
                metadata: Metadata = _MetadataUnpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError, TypeError) as error:
            raise DamagedCheckpointError(f"{index} cannot be read ({error})") from None
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def stored_shapes(reader: SafeReader) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint, by name."""
    items = reader.read_metadata().state_dict_metadata.items()
    return {name: tuple(item.size) for name, item in items if hasattr(item, "size")}


def files_without(reader: SafeReader, prefix: str) -> set[str]:
    """The files of a checkpoint in which no tensor's name begins with `prefix`."""
    places = reader.read_metadata().storage_data.items()
    return {info.relative_path for _, info in places} - {
        info.relative_path for index, info in places if index.fqn.startswith(prefix)
    }


def misfits(wanted: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]], at_most: int = 5) -> str:
    """How the shapes of a checkpoint's tensors differ from those of a job, in either direction, as text with the first
    `at_most` differences; empty if all fit."""
    found = []
    for name, shape in wanted.items():
        if name not in stored:
            found.append(f"{name}: the job wants shape {list(shape)}, the checkpoint has nothing")
        elif tuple(stored[name]) != tuple(shape):
            found.append(f"{name}: the job wants shape {list(shape)}, the checkpoint has shape {list(stored[name])}")
    for name in sorted(stored.keys() - wanted.keys()):
        found.append(f"{name}: the checkpoint has shape {list(stored[name])}, the job has no such tensor")
    more = f"; and {len(found) - at_most} more" if len(found) > at_most else ""
    return "; ".join(found[:at_most]) + more


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor], *, no_dist: bool = False) -> None:
    """Fill tensors, by name, from a checkpoint that has them in these shapes; they keep their dtype and sharding.

    Args:
        no_dist: read on this process alone, even if there are others.
    """
    dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=no_dist or not dist.is_initialized())


class NotMappableError(Exception):
    """A tensor cannot be memory-mapped from a checkpoint; the message says why."""


def map_tensor(reader: SafeReader, name: str) -> torch.Tensor:
    """A stored tensor as a copy-on-write view of its file: pages are read when they are used.

    Raises:
        NotMappableError: it is stored in several parts, as several processes save a sharded one, or its offset is not a
            multiple of its element size (as in versions before the one that writes `__0_model_0.distcp`), which
            compiled code does not allow.
    """
    metadata = reader.read_metadata()
    item = metadata.state_dict_metadata[name]
    if not isinstance(item, TensorStorageMetadata) or len(item.chunks) != 1:
        raise NotMappableError("is stored in parts")
    info = metadata.storage_data[MetadataIndex(name, item.chunks[0].offsets, 0)]
    nbytes = math.prod(item.size) * item.properties.dtype.itemsize
    with (Path(reader.path) / info.relative_path).open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # Each tensor is a zip archive inside the file, with the numbers as they are in the one record data/0.
        file.seek(info.offset)
        with zipfile.ZipFile(_Window(file, info.offset, info.length)) as archive:
            record = next(record for record in archive.infolist() if record.filename.endswith("/data/0"))
        assert record.compress_type == zipfile.ZIP_STORED and record.file_size == nbytes
        file.seek(info.offset + record.header_offset)
        header = file.read(_ZIP_LOCAL_HEADER.size)
    name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(header)[-2:]
    start = info.offset + record.header_offset + _ZIP_LOCAL_HEADER.size + name_length + extra_length
    if start % item.properties.dtype.itemsize:
        raise NotMappableError(f"is not aligned in {info.relative_path}, which an earlier version wrote,")
    flat = torch.frombuffer(view, dtype=item.properties.dtype, count=math.prod(item.size), offset=start)
    return flat.view(item.size)


class _Window(io.RawIOBase):
    """Bytes start..start+length of a file, as a separate file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        self._file.seek(self._start + self._position)
        block = self._file.read(left if size < 0 else min(size, left))
        self._position += len(block)
        return block
