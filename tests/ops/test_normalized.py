"""The row-wise update by orthogonalised momentum, against singular values in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from titan_peer.ops import MissedSteps, cpu, reference, rowwise_normalized_
from titan_peer.ops import triton as kernels
from titan_peer.ops.row_gradients import UPDATE_RMS

N = 6
BACKENDS = pytest.mark.parametrize("backend", [reference, cpu, kernels], ids=["reference", "cpu", "triton"])
LR, DECAY = 0.5, 0.1


def factors(E: int, D: int, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each step: indices int64 [T, K], weights [T, K, E], vectors [T, D]. Row 5 is never used."""
    draw = torch.Generator().manual_seed(E)
    return [
        (
            torch.randint(5, (8, 2), generator=draw) * torch.randint(2, (8, 2), generator=draw),
            torch.randn(8, 2, E, generator=draw),
            torch.randn(8, D, generator=draw),
        )
        for _ in range(steps)
    ]


def polar_factor(m: Tensor) -> Tensor:
    """(M M^T)^(-1/2) M in float64, by singular values; of several rows, damped."""
    u, sizes, vh = torch.linalg.svd(m.double(), full_matrices=False)
    damping = reference.DAMPING * sizes.square().sum() / len(m) if len(m) > 1 else 0.0
    return u @ (sizes / (sizes.square() + damping).sqrt())[:, None].mul(vh)


def step(
    backend: ModuleType,
    tables: tuple[Tensor, Tensor | None],
    indices: Tensor,
    weights: Tensor,
    vectors: Tensor,
    *,
    number: int,
    beta: float,
    last_use: Tensor | None,
) -> None:
    missed = None if last_use is None else MissedSteps(last_use, number, beta, 1.0, 1 - LR * DECAY)
    dtype = tables[0].dtype
    backend.rowwise_normalized_(
        *tables,
        backend.sort_pairs(indices, N),
        weights.to(dtype),
        vectors.to(dtype),
        grad_scale=0.5,
        step_size=LR * UPDATE_RMS,
        beta=beta,
        eps=1e-12,
        decay=1 - LR * DECAY,
        seed=number,
        missed=missed,
    )


@BACKENDS
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize(("E", "D"), [(1, 24), (2, 200), (5, 33)])
def test_the_update_is_the_polar_factor_of_the_momentum_that_looks_ahead(
    backend: ModuleType, E: int, D: int, beta: float
) -> None:
    """With missed steps made good: beta 0.9 per step, used or not; weights decay in every step."""
    start = torch.randn(N, E, D, generator=torch.Generator().manual_seed(1))
    param, last_use = start.clone(), torch.zeros(N, dtype=torch.int32)
    momentum = torch.zeros(N, E, D) if beta else None
    expected, m = start.double(), torch.zeros(N, E, D, dtype=torch.float64)
    steps = factors(E, D, 4)
    for number, (indices, weights, vectors) in enumerate(steps, start=1):
        step(backend, (param, momentum), indices, weights, vectors, number=number, beta=beta, last_use=last_use)
        dense = torch.zeros(N, E, D, dtype=torch.float64)
        outer = 0.5 * weights.double()[..., None] * vectors.double()[:, None, None]
        dense.index_add_(0, indices.flatten(), outer.flatten(0, 1))
        m = beta * m + (1 - beta) * dense
        expected *= 1 - LR * DECAY
        for row in indices.unique().tolist():
            expected[row] -= LR * UPDATE_RMS * max(E, D) ** 0.5 * polar_factor(beta * m[row] + (1 - beta) * dense[row])
    used = last_use == len(steps)
    assert used.any() and not last_use[5]
    torch.testing.assert_close(param[used].double(), expected[used], rtol=1e-3, atol=1e-3)
    if momentum is not None:
        torch.testing.assert_close(momentum[used].double(), m[used], rtol=1e-4, atol=1e-5)
    assert torch.equal(param[5], start[5])


@BACKENDS
@pytest.mark.parametrize("E", [1, 3])
def test_each_update_has_the_same_size_and_blocks_without_full_rank_stay_finite(backend: ModuleType, E: int) -> None:
    D = 32
    indices = torch.tensor([[0, 1], [2, 3]])
    weights, vectors = torch.ones(2, 2, E), torch.randn(2, D, generator=torch.Generator().manual_seed(2))  # rank one
    weights[0, 0] *= 1e-5
    weights[1, 1] = 0  # row 3 has no gradient
    param, momentum = torch.zeros(N, E, D), torch.zeros(N, E, D)
    step(backend, (param, momentum), indices, weights, vectors, number=1, beta=0.9, last_use=None)
    assert param.isfinite().all() and not param[3:].any()
    # a direction of a rank-one block has the norm that one row of a block with full rank has
    sizes = param[:3].square().mean((1, 2)).sqrt() * E**0.5
    torch.testing.assert_close(sizes, torch.full((3,), LR * UPDATE_RMS), rtol=1e-3, atol=0)


def test_bfloat16_momentum_follows_float32() -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        tables = (torch.zeros(N, 1, 512), torch.zeros(N, 1, 512, dtype=dtype))
        for number, some in enumerate(factors(1, 512, 20), start=1):
            step(cpu, tables, *some, number=number, beta=0.9, last_use=None)
        results.append(tables[0])
    assert (results[1] - results[0]).norm() < 0.01 * results[0].norm()


def test_state_that_a_kernel_would_misread_is_refused() -> None:
    pairs = reference.sort_pairs(torch.tensor([[0]]), N)
    arguments = {"lr": 1e-2, "beta": 0.9, "eps": 1e-8, "weight_decay": 0.0, "seed": 1}
    for momentum, message in (
        (torch.zeros(N, 1, 4), r"momentum: has shape \[6, 1, 4\], must be that of param"),
        (torch.zeros(N, 1, 8, dtype=torch.float16), "momentum: has dtype float16"),
    ):
        with pytest.raises(ValueError, match=message):
            rowwise_normalized_(
                torch.zeros(N, 1, 8), momentum, pairs, torch.ones(1, 1, 1), torch.ones(1, 8), **arguments
            )
