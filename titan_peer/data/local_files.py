"""Which files a local source consists of: one rule for folders and glob patterns.

Symbolic links are followed, except into a folder that contains the link. Files and folders whose names begin with a dot
(`._a.jsonl`, `.ipynb_checkpoints`) are not data unless the path names them. A folder called `corpus.jsonl` is read as
the parts of one file.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_peer.common.errors import UserError, os_failure
from titan_peer.config.data_source import DataSource

JSON_SUFFIXES = (".jsonl", ".json")
SUFFIXES = (
    *(s + c for s in JSON_SUFFIXES for c in ("", ".gz", ".zst")),
    ".parquet",
    ".txt",
)


def suffix_of(path: Path) -> str:
    """The one of SUFFIXES by which a file is read, or "". A file `part-...` without a suffix takes its folder's."""
    known = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    if not known and path.name.startswith("part-") and not path.suffix:
        known = next(
            (suffix for suffix in (*JSON_SUFFIXES, ".parquet", ".txt") if path.parent.name.endswith(suffix)), ""
        )
    return known


def local_files(source: DataSource, key: str) -> list[Path]:
    """The files a local source consists of, in order.

    Raises:
        UserError: none is found, a folder cannot be read, or a file has an unknown suffix.
    """
    path = Path(source.path)
    try:
        if path.is_dir():
            found = sorted(_files_in(path, (_identity(path),)))
        else:
            found = [path] if path.is_file() else list(_matches(source.path))
    except OSError as error:
        raise os_failure(f"{key}.path = {source.path}: {error.filename}: cannot be read", error) from None
    if not found:
        raise UserError(
            f"{key}.path = {source.path}: is not a file, a folder with {', '.join(SUFFIXES)} files, or a pattern that "
            "matches any"
        )
    unknown = [p for p in found if not suffix_of(p)]
    if unknown:
        raise UserError(
            f"{key}.path = {source.path}: the suffix of {unknown[0].name} is not one of {', '.join(SUFFIXES)}"
        )
    return found


_Folders = tuple[tuple[int, int], ...]
"""Device and inode of a folder and of the folders on the way to it."""


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entered(folder: Path, above: _Folders) -> _Folders | None:
    """`above` with `folder` added at the end; None if it contains `folder` already."""
    identity = _identity(folder)
    return None if identity in above else (*above, identity)


def _files_in(folder: Path, above: _Folders) -> Iterator[Path]:
    """Data files in a folder and below."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            if suffix_of(entry):
                yield entry
        elif (way := _entered(entry, above)) is not None:
            yield from _files_in(entry, way)


def _matches(pattern: str) -> Iterator[Path]:
    """Files that a pattern matches, and the files in matching folders that are named like a data file.

    The same as the standard library's glob, except that this does not follow links in circles.
    """
    path = Path(pattern)
    parts = [*path.parts, "*"] if path.name == "**" else list(path.parts)
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:fixed])
    found = set(_expand(root, parts[fixed:], (_identity(root),))) if root.is_dir() else set()
    for match, above in sorted(found, key=lambda pair: str(pair[0])):
        if not match.is_dir():
            yield match
        elif suffix_of(match) and (way := _entered(match, above)) is not None:
            yield from sorted(_files_in(match, way))


def _expand(folder: Path, parts: Sequence[str], above: _Folders) -> Iterator[tuple[Path, _Folders]]:
    """Entries below `folder` that the parts of a pattern match, each with the folders on the way to it."""
    if not parts:
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _expand(folder, rest, above)
    entries = folder.iterdir() if glob.has_magic(part) else [folder / part]
    for entry in entries:
        if entry.name.startswith(".") and not part.startswith("."):
            continue
        if part != "**" and not fnmatch.fnmatchcase(entry.name, part):
            continue
        if not rest:
            if os.path.lexists(entry):
                yield entry, above
        elif entry.is_dir() and (way := _entered(entry, above)) is not None:
            yield from _expand(entry, parts if part == "**" else rest, way)
