"""A source's content and how it is read: a saved place in it, or tokens made from it, are valid only while both stay
equal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_peer.common.errors import os_failure
from titan_peer.config.data_source import DataSource
from titan_peer.data.records import Divisible

# A sampled block's size, the most blocks per file (spread over it) and about how many per source: a second on a disk.
_BLOCK_BYTES, _BLOCKS_PER_FILE, _BLOCKS = 2**14, 64, 4096
# If a source has more files than this, only this many are sampled; the sizes of all files are included.
_SAMPLED_FILES = 4096


def identity_of(config: DataSource, parts: Sequence[Divisible], key: str) -> dict[str, Any]:
    """A source's identity, in types that JSON has; it does not depend on where the files lie.

    content   a hash, equal for files with equal bytes, as far as they are sampled
    modified  the newest modification time in nanoseconds: shows changes that the samples miss; 0 without local files
    reading   the keys that decide which documents are made from the files, and their values

    Raises:
        UserError, TransientError: a file can no longer be read, or not at the moment.
    """
    files = [file for part in parts for file in part.files]
    digest = hashlib.blake2b(digest_size=8)
    if not files:
        digest.update("\n".join((config.path, config.subset, config.split)).encode())
    modified = 0
    step = -(-len(files) // _SAMPLED_FILES)
    blocks = max(min(_BLOCKS // max(len(files), 1), _BLOCKS_PER_FILE), 2)
    try:
        for i, file in enumerate(files):
            status = file.stat()
            modified = max(modified, status.st_mtime_ns)
            digest.update(f"{status.st_size},".encode())
            if i % step == 0:
                _add_content(digest, file, status.st_size, blocks)
    except OSError as error:
        raise os_failure(f"{key}: {file}: cannot be read", error) from None
    return {"content": digest.hexdigest(), "modified": modified, "reading": _reading(config, parts)}


def _add_content(digest: hashlib.blake2b, file: Path, size: int, blocks: int) -> None:
    """Hash the whole file if it is no larger than `blocks` blocks, else that many blocks, including the first and
    last."""
    with file.open("rb") as opened:
        if size <= blocks * _BLOCK_BYTES:
            digest.update(opened.read())
            return
        for i in range(blocks):
            opened.seek((size - _BLOCK_BYTES) * i // (blocks - 1))
            digest.update(opened.read(_BLOCK_BYTES))


def _reading(config: DataSource, parts: Sequence[Divisible]) -> dict[str, Any]:
    has_records = any(part.kind == "records" for part in parts)
    keys = ["template" if config.template else "text_key"] if has_records else []
    if any(part.kind != "tokens" for part in parts):
        keys += ["max_document_bytes", "on_bad_document"]
    return {key: getattr(config, key) for key in keys}


def another_reading(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """A key whose change makes other documents from the same files, or None.

    A job that stopped at a bad document may go on with on_bad_document = "skip" or a larger max_document_bytes: it had
    skipped none before.
    """
    for key in ("template", "text_key"):
        if saved.get(key) != now.get(key):
            return key if key in now else "text_key" if "text_key" in now else "template"
    largest, then = now.get("max_document_bytes", 0), saved.get("max_document_bytes", 0)
    if largest < then or (largest > then and saved["on_bad_document"] == "skip"):
        return "max_document_bytes"
    return None
