"""The one choice a job has about the operators besides their arguments; it holds for the whole process."""

from __future__ import annotations

from typing import Literal

TableGradient = Literal["sorted", "atomic", "fastest"]

_table_gradient: TableGradient = "sorted"


def set_table_gradient(way: TableGradient) -> None:
    """How GPU kernels sum dense gradients of expert tables and sub-keys.

    Args:
        way: "sorted": pairs are sorted by row and each row is summed once, in a fixed order, so results repeat bit for
            bit. "atomic": pairs are added in whatever order they arrive. "fastest": the one that a tuning run measured
            as faster for the shape, or "sorted" without a tuning run.
    """
    global _table_gradient
    _table_gradient = way


def use_atomics(measured_faster: bool) -> bool:
    """Whether a dense gradient is summed by atomic additions."""
    return _table_gradient == "atomic" or (_table_gradient == "fastest" and measured_faster)
