"""Remove checkpoints that are no longer wanted. A failure to remove one never prevents a save.

What cannot be removed (a mount point, files that somebody keeps open on NFS, a folder without write permission) is
reported once and tried again at every save.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from pathlib import Path

from titan_peer.checkpoint.folder import saved_steps

logger = logging.getLogger("titan_peer")

_LEFTOVER = re.compile(r"\.step-(\d+)\.(partial|removed|replaced)(-\w+)?")


def hidden_name(step: int, what: str) -> str:
    """A unique name for a folder of step N that is `partial`, `removed` or `replaced`; hidden from readers."""
    return f".step-{step}.{what}-{uuid.uuid4().hex[:12]}"


def restore_replaced(folder: Path) -> None:
    """Restore the name of a checkpoint that was moved aside for a newer one of its step when the job was killed."""
    for path, step, what in _leftovers(folder):
        target = folder / f"step-{step}"
        if what == "replaced" and not target.exists():
            path.rename(target)
            logger.warning("%s was being replaced when the job was killed: it has its name again", target)


def _leftovers(folder: Path) -> list[tuple[Path, int, str]]:
    matches = ((path, _LEFTOVER.fullmatch(path.name)) for path in folder.glob(".step-*"))
    return [(path, int(match[1]), match[2]) for path, match in matches if match]


class Retention:
    """Decides what stays in a folder of checkpoints and removes the rest. Used by one process of a job.

    Args:
        keep_latest_k: how many of the newest checkpoints stay; 0: all.
        keep_every_n_steps: checkpoints at multiples of it stay as well; 0: none.
    """

    def __init__(self, folder: Path, keep_latest_k: int, keep_every_n_steps: int) -> None:
        self.folder = folder
        self.keep_latest_k, self.keep_every_n_steps = keep_latest_k, keep_every_n_steps
        self._said: set[Path] = set()

    def clear_leftovers(self) -> None:
        """Remove what killed jobs and failed removals have left under hidden names."""
        try:
            restore_replaced(self.folder)
            for path, _, _ in _leftovers(self.folder):
                self._remove(path)
        except Exception as error:
            self._say(self.folder, f"cannot be searched for leftovers: {error}")

    def drop_old(self, step: int) -> None:
        """Remove the checkpoints up to `step` that are not to stay."""
        try:
            steps = [s for s in saved_steps(self.folder) if s <= step]
        except OSError as error:
            self._say(self.folder, f"cannot be searched for old checkpoints: {error}")
            return
        for old in steps[: -self.keep_latest_k] if self.keep_latest_k else []:
            if not (self.keep_every_n_steps and old % self.keep_every_n_steps == 0):
                self._drop(self.folder / f"step-{old}", old)

    def _drop(self, checkpoint: Path, step: int) -> None:
        """Rename to a hidden name first, so that a kill in between leaves no partial checkpoint under a visible
        name."""
        if checkpoint.is_symlink():
            logger.info("%s is a link: the link is removed, and its target %s stays", checkpoint, checkpoint.readlink())
            self._remove(checkpoint)
            return
        doomed = checkpoint.with_name(hidden_name(step, "removed"))
        try:
            checkpoint.rename(doomed)
        except OSError as error:
            self._say(checkpoint, f"this old checkpoint cannot be removed and stays: {error}")
            return
        self._remove(doomed)

    def _remove(self, path: Path) -> None:
        try:
            if path.is_symlink() or path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)  # remove the rest, to free its space
            if path.exists():
                self._say(path, f"cannot be removed and stays for now: {error}")

    def _say(self, path: Path, what: str) -> None:
        if path not in self._said:
            self._said.add(path)
            logger.warning("%s: %s", path, what)
