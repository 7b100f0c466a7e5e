"""Which jobs an ablation consists of: axes, their values, and a complete job for every point and seed."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_peer.ablation.solve import Cost, Equal, cost, factorise, set_steps, solve, tokens_per_step
from titan_peer.config import JobConfig, check, data_sources, leaf_keys, load_config
from titan_peer.data_source import DataSource
from titan_peer.errors import UserError


@dataclass(frozen=True)
class Point:
    """A value of an axis."""

    label: str
    apply: Callable[[JobConfig], None]


@dataclass(frozen=True)
class Axis:
    name: str
    points: list[Point]
    changes: frozenset[str]
    """The config keys it sets."""


@dataclass(frozen=True)
class Run:
    """One training run of the ablation."""

    name: str
    """Also its folder's."""
    labels: dict[str, str]
    """axis -> value; empty for the base job."""
    seed: int
    config: JobConfig
    cost: Cost

    @property
    def point(self) -> str:
        """The design, whatever the seed."""
        return ", ".join(f"{axis} = {label}" for axis, label in self.labels.items()) or "base"


# --------------------------------------------------------------------------------------------------------------------
# Axes


def _read_key(config: JobConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _sets(values: dict[str, Any]) -> Callable[[JobConfig], None]:
    """What gives keys of a job these values."""

    def apply(config: JobConfig) -> None:
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            setattr(_read_key(config, section), name, copy.deepcopy(value))

    return apply


def _whole_numbers(name: str, values: Sequence[str]) -> list[int]:
    if not all(value.isdigit() and int(value) >= 1 for value in values):
        raise UserError(f"--axes {name}={','.join(values)}: values must be whole numbers of at least 1")
    return [int(value) for value in values]


def _expert_count(base: JobConfig, values: Sequence[str]) -> Axis:
    number = base.model.peer.num_experts
    points = []
    for wanted in _whole_numbers("expert_count", values) or [max(number // 4, 1), number, number * 4]:
        dims = base.model.peer.product_key_dim
        dims = dims if wanted == number else factorise(wanted, len(dims))
        settings = {"model.peer.num_experts": math.prod(dims), "model.peer.product_key_dim": dims}
        points.append(Point(str(math.prod(dims)), _sets(settings)))
    return Axis("expert_count", points, frozenset({"model.peer.num_experts", "model.peer.product_key_dim"}))


def _peer_number(
    axis: str, key: str, defaults: Callable[[int], list[int]]
) -> Callable[[JobConfig, Sequence[str]], Axis]:
    def build(base: JobConfig, values: Sequence[str]) -> Axis:
        points = []
        for number in _whole_numbers(axis, values) or defaults(getattr(base.model.peer, key)):
            points.append(Point(str(number), _sets({f"model.peer.{key}": number})))
        return Axis(axis, points, frozenset({f"model.peer.{key}"}))

    return build


def _cartesian_dims(base: JobConfig, values: Sequence[str]) -> Axis:
    """How many axes the product keys have (`3`), or the sub-keys of each (`64x16x16`)."""
    peer = base.model.peer
    shapes = []
    for value in values or ["2", "3", "4"]:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", value):
            raise UserError(f"--axes cartesian_dims={value}: must be a number of axes, or sub-keys as in 64x16x16")
        sizes = [int(size) for size in value.split("x")]
        if len(sizes) == 1:
            count = sizes[0]
            sizes = peer.product_key_dim if count == len(peer.product_key_dim) else _exact(peer.num_experts, count)
        shapes.append(sizes)
    points = []
    for shape in shapes:
        settings = {
            "model.peer.product_key_dim": list(shape),
            "model.peer.num_experts": math.prod(shape),
            "model.peer.query_dim": max(round(peer.query_dim / len(shape)), 1) * len(shape),
        }
        points.append(Point("x".join(map(str, shape)), _sets(settings)))
    return Axis("cartesian_dims", points, frozenset(settings))


def _exact(num_experts: int, axes: int) -> list[int]:
    """The most equal factorisation of num_experts into so many axes; the nearest number where there is none."""
    if axes == 1:
        return [num_experts]
    ideal = num_experts ** (1 / axes)
    divisors = [d for d in range(1, math.isqrt(num_experts) + 1) if num_experts % d == 0]
    divisors += [num_experts // d for d in divisors]
    first = min(divisors, key=lambda d: abs(math.log(d / ideal)))
    if abs(math.log(first / ideal)) > math.log(4):
        return factorise(num_experts, axes)
    return sorted([first, *_exact(num_experts // first, axes - 1)], reverse=True)


def _data_mix(base: JobConfig, values: Sequence[str], mixes: dict[str, list[DataSource]]) -> Axis:
    if not mixes:
        sources = base.data.sources
        if len(sources) < 2:
            raise UserError("--axes data_mix: the base job has one data source; name mixes with --custom-datasets FILE")
        mixes = {"all": sources, **{source.name or source.path: [source] for source in sources}}
    unknown = [value for value in values if value not in mixes]
    if unknown:
        raise UserError(f"--axes data_mix={unknown[0]}: the mixes are {', '.join(mixes)}")
    points = [Point(name, _sets({"data.sources": mixes[name]})) for name in values or list(mixes)]
    return Axis("data_mix", points, frozenset({"data.sources"}))


def _config_key(base_arguments: Sequence[str], key: str, values: Sequence[str]) -> Axis:
    """Any key of the job; entries of lists are written with x between them."""
    types = {name: expected for name, expected, _ in leaf_keys()}
    if key not in types:
        raise UserError(f"--axes {key}: must be one of {', '.join([*_NAMED_AXES, 'data_mix'])}, or a key of the job")
    if not values:
        raise UserError(f"--axes {key}: give its values, as in {key}=A,B")
    points = []
    for value in values:
        words = value.split("x") if typing.get_origin(types[key]) is list else [value]
        typed = _read_key(load_config([*base_arguments, f"--{key}", *words]), key)
        points.append(Point(value, _sets({key: typed})))
    return Axis(key, points, frozenset({key}))


_NAMED_AXES: dict[str, Callable[[JobConfig, Sequence[str]], Axis]] = {
    "expert_count": _expert_count,
    "expert_size": _peer_number("expert_size", "expert_hidden_size", lambda size: [size, size * 2, size * 4]),
    "cartesian_dims": _cartesian_dims,
    "selection_heads": _peer_number(
        "selection_heads", "num_heads", lambda heads: sorted({max(heads // 2, 1), heads, heads * 2})
    ),
}


def load_mixes(file: str) -> dict[str, list[DataSource]]:
    """The data mixes of a TOML file: [[mixes.NAME]] tables, each a data source as in a job.

    Raises:
        UserError: the file cannot be read, or has no mixes or unknown keys.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("mixes")
    except OSError as error:
        raise UserError(f"--custom-datasets {file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--custom-datasets {file}: is not valid TOML: {error}") from None
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"--custom-datasets {file}: has no [[mixes.NAME]] table")
    where = f"--custom-datasets {file}"
    return {name: data_sources(sources, f"mixes.{name}", where) for name, sources in tables.items()}


# --------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Plan:
    runs: list[Run]
    axes: dict[str, dict[str, str]]
    """axis -> label -> point of the runs with this value and all else as in the base job. Empty for a grid."""


def build_plan(
    base_arguments: Sequence[str],
    axes: Sequence[str],
    *,
    output_dir: Path,
    grid: bool = False,
    tokens: int | None = None,
    seeds: Sequence[int] = (0,),
    equal: Equal = "none",
    free: str | None = None,
    processes: int = 1,
    mixes: dict[str, list[DataSource]] | None = None,
) -> Plan:
    """All runs of an ablation, checked.

    Args:
        base_arguments: of the base job, as `run_train.sh` takes them.
        axes: `NAME` or `NAME=VALUE,VALUE`.
        grid: every combination of values; else one axis at a time, the others as in the base job.
        tokens: of a run (of the base job's run, where the solver changes it).
        equal, free: see `solve`; every point is made to cost what the base job does.
        processes: of a run.
    Raises:
        UserError: an axis, value or point is impossible.
    """
    base = load_config(base_arguments)
    if tokens is not None:
        set_steps(base, round(tokens / tokens_per_step(base, processes)))
    target = cost(base, processes)
    found = []
    for spec in axes:
        name, _, text = spec.partition("=")
        values = [value for value in text.split(",") if value]
        if name == "data_mix":
            found.append(_data_mix(base, values, mixes or {}))
        elif name in _NAMED_AXES:
            found.append(_NAMED_AXES[name](base, values))
        else:
            found.append(_config_key(base_arguments, name, values))
    if len({axis.name for axis in found}) < len(found):
        raise UserError(f"--axes {' '.join(axes)}: an axis is named twice")

    designs: dict[str, tuple[dict[str, str], JobConfig]] = {}
    of_axes: dict[str, dict[str, str]] = {axis.name: {} for axis in found}
    if grid:
        combinations = list(itertools.product(*([(axis, point) for point in axis.points] for axis in found)))
    else:
        designs["base"] = ({}, base)
        combinations = [((axis, point),) for axis in found for point in axis.points]
    for combination in combinations:
        labels = {axis.name: point.label for axis, point in combination}
        config = copy.deepcopy(base)
        for _, point in combination:
            point.apply(config)
        where = ", ".join(f"{axis} = {label}" for axis, label in labels.items())
        try:
            check(config)
            if config != base:
                changed = frozenset().union(*(axis.changes for axis, _ in combination))
                config = solve(config, target, equal, changed, processes, free)
                check(config)
        except UserError as error:
            raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
        point_name = where if grid or config != base else "base"
        designs.setdefault(point_name, (labels, config))
        if not grid:
            ((axis, point),) = combination
            of_axes[axis.name][point.label] = point_name
    for labels in of_axes.values():
        if not grid and "base" not in labels.values():  # every axis is compared with the base job
            labels["unchanged"] = "base"
    runs = [_run(labels, seed, config, output_dir, processes) for labels, config in designs.values() for seed in seeds]
    return Plan(runs, of_axes)


def _run(labels: dict[str, str], seed: int, design: JobConfig, output_dir: Path, processes: int) -> Run:
    settings = [f"{axis}={label}" for axis, label in labels.items()] or ["base"]
    name = re.sub(r"[^\w.=,+-]", "_", ",".join([*settings, f"seed={seed}"]))
    config = copy.deepcopy(design)
    steps = config.training.steps
    config.debug.seed = seed
    config.job.dump_folder = str(output_dir / "runs" / name)
    config.job.description = ", ".join(settings)
    config.metrics.log_freq = max(steps // 100, 1)
    config.metrics.wandb_group = config.metrics.wandb_group or output_dir.name
    config.validation.enable = bool(config.validation.sources)
    config.validation.freq = max(steps // 10, 1)
    config.checkpoint.interval = max(steps // 4, 1)
    config.checkpoint.keep_latest_k = 1
    return Run(name, labels, seed, config, cost(config, processes))


def plan_table(plan: Plan) -> str:
    """The runs as text: parameters, FLOPs, tokens."""
    header = ("run", "parameters", "active", "FLOPs a token", "tokens", "FLOPs")
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
