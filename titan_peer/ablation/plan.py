"""The jobs of an ablation: a complete job for every point of its axes and every seed."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_peer.ablation.axes import Axis, Point, build_axis, read_key
from titan_peer.ablation.solve import Cost, Equal, cost, set_steps, solve, tokens_per_step
from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import JobConfig, check
from titan_peer.config.parse import leaf_keys, load_config

_OURS = {
    "job.dump_folder": "runs are in --output_dir",
    "job.description": "runs are described by their axes",
    "job.print_config": "--dry_run shows the runs",
    "comm.mode": "--dry_run shows the runs",
    "debug.seed": "give --seeds",
}
"""Keys that an ablation sets for every run itself, and what to use instead."""


@dataclass(frozen=True)
class Run:
    """One training run of the ablation."""

    name: str
    """Also the name of its folder."""
    labels: dict[str, str]
    """axis -> value; empty for the base job."""
    seed: int
    config: JobConfig
    cost: Cost

    @property
    def point(self) -> str:
        """The design, without the seed."""
        return ", ".join(f"{axis} = {label}" for axis, label in self.labels.items()) or "base"


@dataclass(frozen=True)
class Plan:
    runs: list[Run]
    axes: dict[str, dict[str, str]]
    """axis -> label -> point of the runs with this value and otherwise the base job's values. Empty for a grid."""
    notes: list[str] = field(default_factory=list)
    """Numbers that differ from what was asked for or from the base job, and why."""


def build_plan(
    base_arguments: Sequence[str],
    axes: Sequence[str],
    *,
    output_dir: Path,
    grid: bool = False,
    tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    equal: Equal = "none",
    free: str | None = None,
    processes: int = 1,
    mixes: dict[str, list[DataSource]] | None = None,
) -> Plan:
    """All runs of an ablation, checked.

    Args:
        base_arguments: those of the base job, as for `run_train.sh`.
        axes: `NAME` or `NAME=VALUE,VALUE`.
        grid: every combination of values; otherwise one axis at a time, the others as in the base job.
        tokens: per run (of the base job's run, if the solver changes it).
        seeds: for each design; None: the base job's.
        equal, free: see `solve`; every point is made to cost as much as the base job.
        processes: per run.
    Raises:
        UserError: an axis, value or point is impossible.
    """
    given = frozenset(word[2:].partition("=")[0] for word in base_arguments if word.startswith("--"))
    for key in sorted(given & _OURS.keys()):
        raise UserError(f"--{key}: cannot be given to an ablation: {_OURS[key]}")
    base = load_config(base_arguments)
    notes = []
    if tokens is not None:
        notes.append(_set_tokens(base, tokens, processes))
    target = cost(base, processes)
    found = [build_axis(spec, base, base_arguments, mixes) for spec in axes]
    if len({axis.name for axis in found}) < len(found):
        raise UserError(f"--axes {' '.join(axes)}: an axis is named twice")
    for axis in found:
        if axis.name in _OURS:
            raise UserError(f"--axes {axis.name}: cannot be varied: {_OURS[axis.name]}")

    designs: dict[str, tuple[dict[str, str], JobConfig]] = {} if grid else {"base": ({}, base)}
    of_axes: dict[str, dict[str, str]] = {axis.name: {} for axis in found}
    for combination in _combinations(found, grid):
        labels = {axis.name: point.label for axis, point in combination}
        where = ", ".join(f"{axis} = {label}" for axis, label in labels.items())
        try:
            config, changed = _design(base, combination, target, equal, free, processes)
        except UserError as error:
            raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
        notes += [f"{where}: {note}" for note in changed]
        point_name = where if grid or config != base else "base"
        designs.setdefault(point_name, (labels, config))
        if not grid:
            ((axis, point),) = combination
            of_axes[axis.name][point.label] = point_name
    for labels in of_axes.values():
        if not grid and "base" not in labels.values():  # every axis is compared with the base job
            labels["unchanged"] = "base"
    own = given.union(*(axis.changes for axis in found))
    runs = [
        _run(labels, seed, config, own, output_dir, processes)
        for labels, config in designs.values()
        for seed in (seeds if seeds is not None else [base.debug.seed])
    ]
    return Plan(runs, of_axes, list(dict.fromkeys(notes)))


def _set_tokens(base: JobConfig, tokens: int, processes: int) -> str:
    """Make the base job's run as long as `tokens`, in whole steps; returns a line with the actual length."""
    step = tokens_per_step(base, processes)
    if tokens < step:
        raise UserError(
            f"--tokens {tokens:,}: a step of the base job has {step:,} tokens; give at least this many, or make "
            "training.seq_len or training.local_batch_size smaller"
        )
    set_steps(base, round(tokens / step))
    steps, warmup = base.training.steps, base.lr_scheduler.warmup_steps
    return f"--tokens {tokens:,}: {steps * step:,} in {steps:,} steps of {step:,}, {warmup:,} of them warmup"


Combination = tuple[tuple[Axis, Point], ...]


def _combinations(axes: Sequence[Axis], grid: bool) -> Iterator[Combination]:
    if grid:
        yield from itertools.product(*([(axis, point) for point in axis.points] for axis in axes))
    else:
        yield from (((axis, point),) for axis in axes for point in axis.points)


def _design(
    base: JobConfig, combination: Combination, target: Cost, equal: Equal, free: str | None, processes: int
) -> tuple[JobConfig, list[str]]:
    """The job of a combination of values, and notes on what else changed in it.

    All designs have the base job's number of tokens, unless an axis or the solver changes the steps.
    """
    config = copy.deepcopy(base)
    # training.steps first: it scales the warmup, which another axis may then set
    for _, point in sorted(combination, key=lambda pair: pair[0].name != "training.steps"):
        point.apply(config)
    notes = [point.note for _, point in combination if point.note]
    check(config)
    if config == base:
        return config, notes
    changed = frozenset().union(*(axis.changes for axis, _ in combination))
    before = copy.deepcopy(config)
    if "training.steps" not in changed:
        _match_tokens(config, target.tokens, processes)
    matched = config.training.steps
    config = solve(config, target, equal, changed, processes, free)
    if "lr_scheduler.warmup_steps" in changed:
        config.lr_scheduler.warmup_steps = before.lr_scheduler.warmup_steps
    check(config)
    for key, _, _ in leaf_keys():
        old, new = read_key(before, key), read_key(config, key)
        if old != new:
            same_tokens = key == "training.steps" and new == matched
            goal = "the same number of tokens" if same_tokens else f"equal {equal.replace('_', ' ')}"
            reason = "its share of the steps" if key == "lr_scheduler.warmup_steps" else f"for {goal}"
            notes.append(f"{key} = {new} instead of {old}, {reason}")
    if "training.steps" not in changed and config.training.steps == matched:
        tokens = matched * tokens_per_step(config, processes)
        if tokens != target.tokens:
            notes.append(f"{tokens:,} tokens, the base job has {target.tokens:,}: the number of steps is rounded")
    return config, notes


def _match_tokens(config: JobConfig, tokens: int, processes: int) -> None:
    step = tokens_per_step(config, processes)
    if step > tokens:
        raise UserError(f"a step has {step:,} tokens, more than the whole run of the base job ({tokens:,})")
    steps = round(tokens / step)
    if steps != config.training.steps:
        set_steps(config, steps)


def _run(
    labels: dict[str, str], seed: int, design: JobConfig, own: frozenset[str], output_dir: Path, processes: int
) -> Run:
    """The job of a design and seed; `own` are the keys that the command line or an axis sets."""
    settings = [f"{axis}={label}" for axis, label in labels.items()] or ["base"]
    name = re.sub(r"[^\w.=,+-]", "_", ",".join([*settings, f"seed={seed}"]))
    config = copy.deepcopy(design)
    steps = config.training.steps
    config.debug.seed = seed
    config.job.dump_folder = str(output_dir / "runs" / name)
    config.job.description = ", ".join(settings)
    config.metrics.wandb_group = config.metrics.wandb_group or output_dir.name
    if "metrics.log_freq" not in own:
        config.metrics.log_freq = max(steps // 100, 1)
    if "validation.enable" not in own:
        config.validation.enable = bool(config.validation.sources)
    if "validation.freq" not in own:
        config.validation.freq = max(steps // 10, 1)
    if "checkpoint.interval" not in own:
        config.checkpoint.interval = max(steps // 4, 1)
    if "checkpoint.keep_latest_k" not in own:
        config.checkpoint.keep_latest_k = 1
    return Run(name, labels, seed, config, cost(config, processes))


def plan_table(plan: Plan) -> str:
    """The runs as a text table: parameters, FLOPs, tokens."""
    header = ("run", "parameters", "active", "FLOPs per token", "tokens", "FLOPs")
    rows = [
        (
            run.name,
            f"{run.cost.total_parameters:,}",
            f"{run.cost.active_parameters:,}",
            f"{run.cost.flops_per_token:,}",
            f"{run.cost.tokens:,}",
            f"{run.cost.flops:.3e}",
        )
        for run in plan.runs
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (header, *rows)
    ]
    return "\n".join(lines)
