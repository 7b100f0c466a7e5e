"""Where documents come from: local JSONL and text files."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_peer.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


@dataclass
class DataSource:
    """A set of documents."""

    path: str
    """A file (.jsonl, .jsonl.gz, .txt), a folder of such files, or a glob pattern; a .txt file is one document."""
    name: str = ""
    """What reports call it; the path if empty."""
    text_key: str = "text"
    """The key of a JSON line that holds the document."""


def _files(source: DataSource, key: str) -> list[Path]:
    path = Path(source.path)
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES)]
    else:
        found = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(source.path, recursive=True))]
    if not found:
        raise UserError(f"{key}.path = {source.path}: no such file, folder with {', '.join(SUFFIXES)}, or match")
    unknown = [p for p in found if not p.name.endswith(SUFFIXES)]
    if unknown:
        raise UserError(f"{key}.path = {source.path}: {unknown[0]} is not one of {', '.join(SUFFIXES)}")
    return found


def _documents_of_file(file: Path, text_key: str, key: str) -> Iterator[str]:
    if file.name.endswith(".txt"):
        yield file.read_text(encoding="utf-8")
        return
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise UserError(f"{key}: {file}:{number}: is not JSON: {error}") from None
            text = document.get(text_key) if isinstance(document, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{key}: {file}:{number}: has no text under {key}.text_key = {text_key!r}")
            yield text


def read_documents(sources: Sequence[DataSource], section: str = "data") -> list[str]:
    """All non-empty documents of all sources, in the order of sources, files and lines.

    Args:
        section: of the job file, for error messages.
    Raises:
        UserError: a path matches nothing, or a file cannot be read as what it should be.
    """
    documents: list[str] = []
    for i, source in enumerate(sources):
        key = f"{section}.sources[{i}]"
        before = len(documents)
        for file in _files(source, key):
            try:
                documents += (text for text in _documents_of_file(file, source.text_key, key) if text)
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise UserError(f"{key}: {file}: cannot be read: {error}") from None
        if len(documents) == before:
            raise UserError(f"{key}.path = {source.path}: all its documents are empty")
    return documents
