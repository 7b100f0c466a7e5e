"""What an ablation varies: axes, whose values are changes of a job. Numbers that a person gives are never adjusted."""

from __future__ import annotations

import copy
import functools
import math
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_peer.ablation.solve import nearest_shape, set_steps
from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import data_sources, leaf_keys, load_config
from titan_peer.model_args import squarest

MOST_UNEQUAL = 4
"""The largest ratio between the numbers of sub-keys of two axes, if the sizes are derived from a number of experts."""


@dataclass(frozen=True)
class Point:
    """A value of an axis."""

    label: str
    apply: Callable[[JobConfig], None]
    note: str = ""
    """What the value changes besides the key that it names."""


@dataclass(frozen=True)
class Axis:
    name: str
    points: list[Point]
    changes: frozenset[str]
    """The config keys it sets."""


def read_key(config: JobConfig, key: str) -> Any:
    """The value of a key such as training.steps."""
    return functools.reduce(getattr, key.split("."), config)


def _sets(values: dict[str, Any]) -> Callable[[JobConfig], None]:
    """A function that gives keys of a job these values."""

    def apply(config: JobConfig) -> None:
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            setattr(read_key(config, section), name, copy.deepcopy(value))

    return apply


def _whole_numbers(name: str, values: Sequence[str]) -> list[int]:
    if not all(value.isdigit() and int(value) >= 1 for value in values):
        raise UserError(f"--axes {name}={','.join(values)}: values must be whole numbers of at least 1")
    return [int(value) for value in values]


def exact_shape(num_experts: int, axes: int) -> list[int] | None:
    """Numbers of sub-keys per axis, as equal as possible, with the product num_experts; None if they are too
    unequal."""
    shape = squarest(num_experts, axes)
    return shape if shape[0] <= MOST_UNEQUAL * shape[-1] else None


def _expert_count(base: JobConfig, values: Sequence[str]) -> Axis:
    peer = base.model.peer
    number, axes = peer.num_experts, len(peer.product_key_dim)
    shapes = []
    for wanted in _whole_numbers("expert_count", values):
        shape = peer.product_key_dim if wanted == number else exact_shape(wanted, axes)
        if shape is None:
            below = next((n for n in range(wanted - 1, 0, -1) if exact_shape(n, axes)), None)
            above = next(n for n in range(wanted + 1, 2**axes * wanted + 2) if exact_shape(n, axes))
            near = " or ".join(f"{n:,} ({_text(exact_shape(n, axes) or [])})" for n in (below, above) if n)
            raise UserError(
                f"--axes expert_count={wanted}: cannot be divided over {axes} product-key axes of similar size; close to it: "
                f"{near}. The axis cartesian_dims takes the sizes themselves"
            )
        shapes.append(shape)
    if not values:
        others = [nearest_shape(wanted, axes) for wanted in (max(number // 4, 1), number * 4)]
        shapes = [others[0], peer.product_key_dim, others[1]]
    points = []
    for shape in shapes:
        settings = {"model.peer.num_experts": math.prod(shape), "model.peer.product_key_dim": shape}
        points.append(Point(str(math.prod(shape)), _sets(settings)))
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


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _cartesian_shape(base: JobConfig, value: str) -> list[int]:
    peer = base.model.peer
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", value):
        raise UserError(f"--axes cartesian_dims={value}: must be a number of axes, or sub-keys as in 64x16x16")
    sizes = [int(size) for size in value.split("x")]
    if len(sizes) > 1:
        return sizes
    if sizes[0] == len(peer.product_key_dim):
        return peer.product_key_dim
    shape = exact_shape(peer.num_experts, sizes[0])
    if shape is None:
        near = _text(nearest_shape(peer.num_experts, sizes[0]))
        raise UserError(
            f"--axes cartesian_dims={value}: model.peer.num_experts = {peer.num_experts:,} cannot be divided over {value} "
            f"axes of similar size; give the sizes themselves, as in cartesian_dims={near}"
        )
    return shape


def _cartesian_dims(base: JobConfig, values: Sequence[str]) -> Axis:
    """The number of axes of the product keys (`3`), or the number of sub-keys of each axis (`64x16x16`)."""
    peer = base.model.peer
    points: list[Point] = []
    settings: dict[str, Any] = {}
    for shape in [_cartesian_shape(base, value) for value in values or ["2", "3", "4"]]:
        settings = {
            "model.peer.product_key_dim": list(shape),
            "model.peer.num_experts": math.prod(shape),
            "model.peer.query_dim": max(round(peer.query_dim / len(shape)), 1) * len(shape),
        }
        notes = []
        if settings["model.peer.num_experts"] != peer.num_experts:
            notes.append(f"model.peer.num_experts = {math.prod(shape):,} instead of {peer.num_experts:,}")
        if settings["model.peer.query_dim"] != peer.query_dim:
            notes.append(
                f"model.peer.query_dim = {settings['model.peer.query_dim']} instead of {peer.query_dim}, which "
                f"{len(shape)} axes do not divide"
            )
        points.append(Point(_text(shape), _sets(settings), "; ".join(notes)))
    return Axis("cartesian_dims", points, frozenset(settings))


def _data_mix(base: JobConfig, values: Sequence[str], mixes: dict[str, list[DataSource]]) -> Axis:
    if not mixes:
        sources = base.data.sources
        if len(sources) < 2:
            raise UserError("--axes data_mix: the base job has one data source; name mixes with --custom_datasets FILE")
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
        typed = read_key(load_config([*base_arguments, f"--{key}", *words]), key)
        change = functools.partial(set_steps, steps=typed) if key == "training.steps" else _sets({key: typed})
        points.append(Point(value, change))
    return Axis(key, points, frozenset({key}))


_NAMED_AXES: dict[str, Callable[[JobConfig, Sequence[str]], Axis]] = {
    "expert_count": _expert_count,
    "expert_size": _peer_number("expert_size", "expert_hidden_size", lambda size: [size, size * 2, size * 4]),
    "cartesian_dims": _cartesian_dims,
    "selection_heads": _peer_number(
        "selection_heads", "num_heads", lambda heads: sorted({max(heads // 2, 1), heads, heads * 2})
    ),
}


def build_axis(
    spec: str, base: JobConfig, base_arguments: Sequence[str], mixes: dict[str, list[DataSource]] | None
) -> Axis:
    """The axis that `NAME` or `NAME=VALUE,VALUE` names.

    Args:
        base: the base job, described by `base_arguments` as on a command line.
        mixes: for the axis data_mix.
    Raises:
        UserError: there is no such axis, or a value is invalid for it.
    """
    name, _, text = spec.partition("=")
    values = [value for value in text.split(",") if value]
    if name == "data_mix":
        return _data_mix(base, values, mixes or {})
    if name in _NAMED_AXES:
        return _NAMED_AXES[name](base, values)
    return _config_key(base_arguments, name, values)


def load_mixes(file: str) -> dict[str, list[DataSource]]:
    """The data mixes of a TOML file: [[mixes.NAME]] tables, each a data source as in a job.

    Raises:
        UserError: the file cannot be read, or has no mixes or unknown keys.
    """
    where = f"--custom_datasets {file}"
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("mixes")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{where}: is not valid TOML: {error}") from None
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{where}: has no [[mixes.NAME]] table")
    return {name: data_sources(sources, f"mixes.{name}", where) for name, sources in tables.items()}
