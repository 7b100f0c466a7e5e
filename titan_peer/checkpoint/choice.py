"""Find the checkpoint that a path means: itself, or the newest complete one of a job or of a folder of checkpoints.

Every command and key that takes a checkpoint finds it with these functions.
"""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

from titan_peer.checkpoint.folder import CONFIG, MANIFEST, TRAIN_STATE, saved_steps
from titan_peer.common.errors import UserError

logger = logging.getLogger("titan_peer")

_EXPORTED = "config.json"  # only an exported model has it
WHAT_TO_GIVE = "a job's folder (its newest checkpoint is taken) or a checkpoint, <job.dump_folder>/checkpoint/step-N"


def find_checkpoint(given: Path | str, key: str) -> Path:
    """The folder `step-N` that `given` means; logged if there was a choice.

    Args:
        given: a checkpoint; a job's folder; or a folder of checkpoints. Of the last two the newest complete one is
            taken.
        key: the flag or config key with which it was given, for messages.
    Raises:
        UserError: there is no checkpoint.
    """
    given = Path(given)
    if (given / TRAIN_STATE).is_file() and not (given / _EXPORTED).is_file():
        return given
    if complete := _complete(given):
        logger.info("%s: its newest checkpoint is %s", given, complete[-1])
        return complete[-1]
    raise UserError(f"{key} {given}: {_what_it_is(given)}; give {WHAT_TO_GIVE}")


def find_checkpoints(given: Path, key: str) -> list[Path]:
    """The complete checkpoints of a job's folder, or of a folder of checkpoints, in the order of their steps.

    Raises:
        UserError: there is none.
    """
    if complete := _complete(given):
        return complete
    what = "is one checkpoint" if (given / TRAIN_STATE).is_file() else _what_it_is(given)
    raise UserError(f"{key} {given}: {what}; give a job's folder or its folder of checkpoints")


def _complete(given: Path) -> list[Path]:
    for folder in (given, given / _checkpoint_folder(given)):
        complete = [path for step in saved_steps(folder) if _is_complete(path := folder / f"step-{step}")]
        if complete:
            return complete
    return []


def _is_complete(folder: Path) -> bool:
    return (folder / TRAIN_STATE).is_file() and (folder / MANIFEST).is_file()


def _checkpoint_folder(job_folder: Path) -> str:
    """checkpoint.folder of the job that wrote to `job_folder`."""
    try:
        table = tomllib.loads((job_folder / CONFIG).read_text(encoding="utf-8"))
        return str(table["checkpoint"]["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return "checkpoint"


def _what_it_is(given: Path) -> str:
    if not given.exists():
        return "does not exist"
    if not given.is_dir():
        return "is not a folder"
    if (given / _EXPORTED).is_file():
        return "is an exported model (titan-peer import makes a checkpoint of it), not a checkpoint"
    return "has no complete checkpoint in it"
