"""The range of a number in a dataclass, declared beside its field: `steps: Annotated[int, Range(1)] = 1000`."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

_LARGEST = {int: 2**63 - 1, float: 3.4028234663852886e38}  # in C++ and in float32
_SMALLEST = 1.1754943508222875e-38  # the smallest positive normal float32


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; NaN and infinity are never allowed.

    Args:
        low: the minimum; with `above` true it is itself excluded.
        high: the maximum; with `below` true it is itself excluded.
        also: further allowed values, whose meaning the field's docstring explains.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[int, ...] = ()

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        high_enough = value > max(self.low, 0 if self.low else _SMALLEST) if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= min(self.high, _LARGEST[type(value)])
        return math.isfinite(value) and high_enough and low_enough

    def __str__(self) -> str:
        """What is allowed, as in "at least 1 or -1"."""
        if self.high == math.inf:
            words = f"more than {self.low}" if self.above else f"at least {self.low}" if self.low else "not negative"
        elif not self.above and not self.below:
            words = f"from {self.low} to {self.high}"
        else:
            high = f"less than {self.high}" if self.below else f"at most {self.high}"
            words = f"{'more than' if self.above else 'at least'} {self.low} and {high}"
        return " or ".join([words, *map(str, self.also)])

    def problem(self, value: float) -> str:
        """Why a value outside the range is refused."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a number, finite and {self}"
        if value > _LARGEST[type(value)]:
            return f"must be at most {_LARGEST[type(value)]:,}"
        if self.above and 0 == self.low < value < self.high:
            return f"must be more than {self.low} in float32 too, but there it is 0"
        return "must not be negative" if str(self) == "not negative" else f"must be {self}"


def declared_range(hint: Any) -> Range | None:
    """The range in a field's type hint; for a list, the range of its entries."""
    if typing.get_origin(hint) is list:
        return declared_range(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    return None


def out_of_range(settings: Any, prefix: str) -> Iterator[str]:
    """A message for every number outside its range, and every word that is none of those allowed, in a dataclass and
    those nested in it; `prefix` is put before the key."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        key, value = f"{prefix}{field.name}", getattr(settings, field.name)
        allowed = declared_range(hints[field.name])
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{key}.")
        elif typing.get_origin(hints[field.name]) is Literal and value not in typing.get_args(hints[field.name]):
            yield f"{key} = {value!r}: must be one of {', '.join(map(repr, typing.get_args(hints[field.name])))}"
        elif allowed is not None:
            numbers = [(f"{key}[{i}]", n) for i, n in enumerate(value)] if isinstance(value, list) else [(key, value)]
            yield from (f"{name} = {n}: {allowed.problem(n)}" for name, n in numbers if n not in allowed)


class Section:
    """A section of a job: a dataclass of keys, some with a range. `class Training(Section, name="training")`."""

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name

    def problems(self) -> list[str]:
        """What makes the values impossible: one line per problem, naming key, value and what is allowed."""
        return list(out_of_range(self, f"{self.section}."))

    def problem(self, field: str, allowed: str) -> list[str]:
        """The problem with one field's value, as a list to be added to `problems`."""
        return [f"{self.section}.{field} = {getattr(self, field)}: {allowed}"]
