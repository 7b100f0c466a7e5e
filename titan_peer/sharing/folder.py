"""Names of what an exported folder holds, and where folders may be made. Without torch, so that a wrong path is found
at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from titan_peer.common.errors import UserError

TableDtype = Literal["float", "int8", "float8_e4m3"]
"""Dtype of the expert tables in an export: that of the other weights, or codes of one byte with a scale per row."""
INDEX, CONFIG_JSON = "model.safetensors.index.json", "config.json"


def require_exported(folder: Path) -> None:
    """Raise UserError unless there is an exported folder, as far as can be seen without opening a file."""
    if not folder.is_dir():
        raise UserError(f"--input {folder}: is not a folder")
    if not (folder / CONFIG_JSON).exists():
        raise UserError(f"{folder / CONFIG_JSON}: does not exist; give a folder that titan-peer export wrote")


def new_folder(key: str, path: Path, source: Path) -> Path:
    """The absolute path of a folder to be made from what `source` holds; it may exist if it is empty.

    Raises:
        UserError: it exists and is not empty, or no folder can be put there.
    """
    folder = path.resolve()
    problem = ""
    if folder == Path.cwd():
        problem = "is the folder you are in; give a new folder"
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "exists already; give a new folder"
    elif folder.is_mount():
        problem = "is a mount point; give a new folder in it"
    elif folder.is_relative_to(source.resolve()):
        problem = f"lies in {source}; give a folder elsewhere"
    if problem:
        raise UserError(f"{key} {path}: {problem}")
    return folder
