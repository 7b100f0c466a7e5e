"""Rows that missed steps, brought up to date in closed form, against torch's AdamW on whole tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from titan_peer.ops import MissedSteps, cpu, reference
from titan_peer.ops import triton as kernels

N, E, D = 7, 2, 5
F64, F32 = torch.float64, torch.float32


def uses(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """int64 [R, 1], the rows that each step uses, from row 0 in nearly every step to the last one hardly ever, and all
    in the last step; their gradients, float64 [R, E * D]."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        is_used = torch.rand(N, generator=draw) < 0.9 / (1 + torch.arange(N)) ** 2
        is_used[0] |= not is_used.any()
        is_used |= torch.tensor(step == steps - 1)
        rows = is_used.nonzero()
        yield rows, torch.randn(len(rows), E * D, generator=draw, dtype=F64)


class Table:
    """A table with row-wise updates by one backend, from step `start` on, from rows that are up to date."""

    def __init__(self, backend: ModuleType, dtype: torch.dtype, start: int, *, by_row: bool = False) -> None:
        self.backend, self.step = backend, start
        weights = torch.randn(N, E * D, generator=torch.Generator().manual_seed(9), dtype=F64)
        self.weights = weights.to(dtype).view(N, 1, E * D).clone()
        self.exp_avg = torch.zeros_like(self.weights)
        self.exp_avg_sq = torch.zeros(N, dtype=dtype) if by_row else torch.zeros_like(self.weights)
        self.last_use = torch.full((N,), start, dtype=torch.int32)

    def update(self, rows: Tensor, gradients: Tensor, *, lr: float, betas: tuple[float, float], decay: float) -> None:
        self.step += 1
        beta1, beta2 = betas
        self.backend.rowwise_adamw_(
            *(self.weights, self.exp_avg, self.exp_avg_sq),
            self.backend.sort_pairs(rows, N),
            torch.ones(len(rows), 1, 1, dtype=self.weights.dtype),
            gradients.to(self.weights.dtype),
            **{"grad_scale": 1.0, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": 1e-30, "weight_decay": decay},
            bias_correction1=1 - beta1**self.step,
            bias_correction2=1 - beta2**self.step,
            seed=self.step,
            missed=MissedSteps(self.last_use, self.step, beta1, beta2, 1 - lr * decay),
        )


PATTERNS = [
    # betas, lr, weight decay, steps
    ((0.9, 0.95), 1e-2, 0.0, 120),
    ((0.9, 0.95), 1e-2, 0.1, 120),
    ((0.9, 0.999), 1e-2, 1.0, 120),
    ((0.99, 0.99), 1e-2, 1 - math.sqrt(0.99), 120),
    ((0.0, 0.99), 1e-2, 0.1, 100),
    ((0.98, 0.98), 1e-1, 10 * (1 - math.sqrt(0.98)), 120),  # weights and update decay by one factor: 0 / 0
]


@pytest.mark.parametrize(("betas", "lr", "decay", "steps"), PATTERNS)
def test_rows_used_in_any_pattern_end_where_dense_adamw_takes_them(
    betas: tuple[float, float], lr: float, decay: float, steps: int
) -> None:
    start = 20_000  # past bias correction
    table = Table(reference, F64, start)
    dense = torch.nn.Parameter(table.weights.clone())
    adamw = torch.optim.AdamW([dense], lr=lr, betas=betas, eps=1e-30, weight_decay=decay)
    zeros = {"exp_avg": torch.zeros_like(dense), "exp_avg_sq": torch.zeros_like(dense)}
    adamw.state[dense] = {"step": torch.tensor(float(start)), **zeros}
    for rows, gradients in uses(steps, seed=1):
        dense.grad = torch.zeros_like(dense)
        dense.grad[rows[:, 0], 0] = gradients
        adamw.step()
        table.update(rows, gradients, lr=lr, betas=betas, decay=decay)
    state = adamw.state[dense]
    ours = (table.weights, table.exp_avg, table.exp_avg_sq)
    torch.testing.assert_close(ours, (dense.data, state["exp_avg"], state["exp_avg_sq"]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("backend", "steps"), [(cpu, 200), (kernels, 8)], ids=["cpu", "triton"])
def test_kernels_make_missed_steps_good_as_the_reference_does(backend: ModuleType, steps: int, by_row: bool) -> None:
    tables = [Table(b, dtype, 50, by_row=by_row) for b, dtype in ((backend, F32), (reference, F64))]
    for i, (rows, gradients) in enumerate(uses(steps, seed=2)):
        for table in tables:
            if i == steps - 2:
                table.step += 5000  # more missed steps than the kernels have a table of
            table.update(rows, gradients, lr=1e-2, betas=(0.9, 0.999), decay=0.02)
    ours, theirs = ((t.weights.double(), t.exp_avg.double(), t.exp_avg_sq.double()) for t in tables)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(tables[0].last_use, tables[1].last_use) and (tables[0].last_use == tables[0].step).all()


@pytest.mark.parametrize("by_row", [False, True])
def test_bfloat16_moments_are_brought_up_to_date(by_row: bool) -> None:
    exact, rounded = Table(reference, F64, 50, by_row=by_row), Table(cpu, F32, 50, by_row=by_row)
    rounded.exp_avg = rounded.exp_avg.bfloat16()
    rounded.exp_avg_sq = rounded.exp_avg_sq if by_row else rounded.exp_avg_sq.bfloat16()
    for rows, gradients in uses(100, seed=3):
        for table in (exact, rounded):
            table.update(rows, gradients, lr=1e-2, betas=(0.9, 0.95), decay=0.1)
    moved = exact.weights - Table(reference, F64, 50).weights
    assert (rounded.weights.double() - exact.weights).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("decay", [1.0, 0.9999, 0.95, 0.9, 0.9 / math.sqrt(0.95), 0.5])
def test_the_factors_are_those_of_the_steps_one_by_one(decay: float) -> None:
    beta1, beta2 = 0.9, 0.95
    ratio, moved, one_by_one = beta1 / math.sqrt(beta2), 0.0, []
    for n in range(600):
        one_by_one.append([beta1**n, beta2**n, decay**n, moved])
        moved = decay * moved + ratio ** (n + 1)
    missed = MissedSteps(torch.zeros(600, dtype=torch.int32), 1, beta1, beta2, decay)
    expected = torch.tensor(one_by_one, dtype=F64)
    torch.testing.assert_close(missed.factors(torch.arange(600)), expected, rtol=1e-10, atol=0)
    table = missed.table()
    torch.testing.assert_close(table.double(), expected[: len(table)], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("beta1", "beta2", "decay"), [(0.95, 0.9, 1.0), (0.9, 0.0, 1.0), (0.9, 0.95, 0.0)])
def test_what_has_no_closed_form_is_refused(beta1: float, beta2: float, decay: float) -> None:
    with pytest.raises(ValueError, match="missed steps: beta1"):
        MissedSteps(torch.zeros(3, dtype=torch.int32), 1, beta1, beta2, decay)
