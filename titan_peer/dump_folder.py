"""The folder that a job writes to: who may, its own configuration, and what an earlier job has left there."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from titan_peer.common.errors import TransientError, UserError, os_failure
from titan_peer.common.folder_lock import FolderLock
from titan_peer.config.job import JobConfig
from titan_peer.metrics.sinks import complete_lines

logger = logging.getLogger("titan_peer")

CONFIG, METRICS, LOSS_PLOT = "config.toml", "metrics.jsonl", "loss.png"
EXPERT_USAGE = "expert_usage"
USAGE_RECORDS = f"{EXPERT_USAGE}/expert_usage.jsonl"
_EVALUATION = ("evaluation", "evaluation.md", "evaluation.png")


class JobLock:
    """Keeps other jobs out of job.dump_folder, and out of checkpoint.folder where that lies elsewhere.

    Raises:
        UserError: another job has one of them, and does not end within job.lock_wait_seconds.
        UserError, TransientError: one cannot be written to.
    """

    def __init__(self, config: JobConfig) -> None:
        # the other processes of the job wait in a collective meanwhile
        seconds = min(config.job.lock_wait_seconds, config.parallelism.timeout_seconds // 2)
        folder = Path(config.job.dump_folder)
        checkpoints = (folder / config.checkpoint.folder).resolve()
        self._locks = [FolderLock(folder, seconds)]
        if config.checkpoint.enable and folder.resolve() not in checkpoints.parents:
            try:
                self._locks.append(FolderLock(checkpoints, seconds, "checkpoint.folder"))
            except BaseException:
                self.release()
                raise

    def require_mine(self) -> None:
        """Raise UserError when another job has taken a folder meanwhile, as it may when this one stood still."""
        for lock in self._locks:
            lock.require_mine()

    def release(self) -> None:
        """Let other jobs in."""
        for lock in self._locks:
            lock.release()


def cannot_be_written(config: JobConfig, error: OSError) -> UserError | TransientError:
    return os_failure(f"job.dump_folder = {config.job.dump_folder}: cannot be written", error)


def begin_reports(config: JobConfig, resumed_step: int) -> None:
    """Set aside what an earlier job has reported and this one would write over, and write the resolved job.

    Args:
        resumed_step: of the job's own checkpoint that it goes on from; 0: it starts anew.
    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)  # a Trainer may be used without a lock, which makes it
    if resumed_step == 0:
        _set_aside(folder, _earlier_reports(config, folder), copy=False)
    elif config.checkpoint.load_step > 0:  # chosen by a person, who goes back behind what was reported
        records = [name for name in (METRICS, USAGE_RECORDS) if _goes_beyond(folder / name, resumed_step)]
        _set_aside(folder, records, copy=True)
    _write_config(config, folder)


def _earlier_reports(config: JobConfig, folder: Path) -> list[str]:
    """What a job writes, or adds to, beside its checkpoints, the lock and W&B's own folder; nothing if none was
    here."""
    profiling = config.profiling
    traces = (profiling.save_traces_folder, profiling.save_memory_snapshot_folder)
    inside = [name for name in traces if folder.resolve() in (folder / name).resolve().parents]
    names = [CONFIG, METRICS, LOSS_PLOT, EXPERT_USAGE, *_EVALUATION, "tensorboard", "wandb_run_id", *inside]
    found = [name for name in names if os.path.lexists(folder / name)]
    return found if METRICS in found else []


def _goes_beyond(records: Path, step: int) -> bool:
    return any(record["step"] > step for record in complete_lines(records))


def _set_aside(folder: Path, names: Sequence[str], *, copy: bool) -> None:
    if not names:
        return
    target = _free(folder / "superseded")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copy2(folder / name, target / name)
        else:
            (folder / name).rename(target / name)
    logger.warning("%s what an earlier job reported to %s", "copied" if copy else "moved", target)


def _free(path: Path) -> Path:
    """The path, or the same with a number, that nothing has yet."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def _write_config(config: JobConfig, folder: Path) -> None:
    """For a person; every checkpoint has its own. Another one that is there is kept under another name."""
    path, text = folder / CONFIG, config.to_toml().encode()
    if path.exists() and path.read_bytes() != text:
        path.rename(_free(folder / f"{CONFIG}.superseded"))
    path.write_bytes(text)
