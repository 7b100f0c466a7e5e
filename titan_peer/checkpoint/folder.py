"""The names of a checkpoint's files, and the saved steps of a folder. Without torch, so that a wrong path is found at
once."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST, TRAIN_STATE, CONFIG, TOKENIZER = "manifest.json", "train_state.json", "config.toml", "tokenizer"

MODEL, AVERAGE, UPDATES = "model.", "ema.", "ema_updates"
"""How the names of tensors begin: weights, and their moving averages. The third is the number of updates averaged over."""

_STEP_FOLDER = re.compile(r"step-(\d+)")


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)
