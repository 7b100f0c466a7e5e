"""The version of a job's keys, and how files of earlier versions are read.

A job is written with `config_version`. A change that renames, moves or removes a key, or changes what a value means,
raises CONFIG_VERSION and adds the step from the previous version to MIGRATIONS, so that checkpoints saved before still
open and resume. A new key needs nothing: a file without it gets the default, which must mean what was done before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from titan_peer.common.errors import UserError

KEY = "config_version"
CONFIG_VERSION = 2
"""The version of the present keys. Files without `config_version` have version 0, which had the same keys."""

Migration = Callable[[dict[str, Any]], None]
"""Changes a job's table in place."""


def rename(table: dict[str, Any], old: str, new: str) -> None:
    """For migrations: move the value of the key `old` ("training.steps") to the name `new`, if there is one."""
    *old_sections, old_name = old.split(".")
    *new_sections, new_name = new.split(".")
    path = [table]
    for name in old_sections:
        path.append(path[-1].get(name, {}))
    if old_name not in path[-1]:
        return
    value = path[-1].pop(old_name)
    if old_sections and not path[-1]:
        del path[-2][old_sections[-1]]
    section = table
    for name in new_sections:
        section = section.setdefault(name, {})
    section[new_name] = value


def _group_of_expert_tables(table: dict[str, Any]) -> None:
    """1 to 2: rate and decay of expert tables are those of a parameter group; the row-wise update can make good what a
    row has missed, which it did not."""
    rename(table, "optimizer.expert_lr_factor", "optimizer.expert_tables.lr_factor")
    rename(table, "optimizer.expert_weight_decay", "optimizer.expert_tables.weight_decay")
    optimizer = table.setdefault("optimizer", {})
    if optimizer.get("expert_update") != "dense":
        optimizer.setdefault("expert_catch_up", False)


MIGRATIONS: Mapping[int, Migration] = {1: _group_of_expert_tables}
"""Version -> the change that turns its table into one of the next version; a version not listed has the same keys as
the next."""


def migrated(
    table: Mapping[str, Any],
    where: str,
    *,
    unversioned: int = CONFIG_VERSION,
    current: int = CONFIG_VERSION,
    migrations: Mapping[int, Migration] = MIGRATIONS,
) -> dict[str, Any]:
    """A job's table with the keys of this version, without `config_version`.

    Args:
        where: the file, for messages.
        unversioned: the version of a table without `config_version`; for a job that a user writes, the present one.
    Raises:
        UserError: `config_version` is not a whole number of at least 0.
    """
    result = copy.deepcopy(dict(table))
    version = result.pop(KEY, unversioned)
    if type(version) is not int or version < 0:
        raise UserError(f"{where}: {KEY} = {version!r}: must be a whole number, at least 0")
    for step in range(version, current):
        if step in migrations:
            migrations[step](result)
    return result
