"""The job that wrote a checkpoint or an export, read from its config.toml, whichever version wrote it."""

from __future__ import annotations

import functools
import logging
import tomllib
from pathlib import Path

from titan_peer.common.errors import UserError, os_failure
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import job_from_table
from titan_peer.config.version import CONFIG_VERSION, KEY, migrated

logger = logging.getLogger("titan_peer")


def read_saved_job(file: Path) -> JobConfig:
    """The job of a saved config.toml.

    Keys of earlier versions are migrated. Keys and values that this version does not know are left out and reported in
    one line; in [model], which says what the weights mean, they are errors.

    Raises:
        UserError: the file cannot be read, or this version cannot build its [model].
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise os_failure(f"{file}: cannot be read", error) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    written_by = table.get(KEY, 0)
    left_out: list[str] = []
    job = job_from_table(migrated(table, str(file), unversioned=0), str(file), left_out)
    problems = job.model.problems()
    if problems:
        raise UserError("\n".join(f"{file}: {problem}" for problem in problems))
    if left_out:
        newer = f" (it is of a newer version, {KEY} {written_by})" if written_by > CONFIG_VERSION else ""
        _say_once(f"{file}{newer}: what this version does not know is left out: {', '.join(left_out)}")
    return job


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
