"""The Triton kernels compared with the plain PyTorch reference: on a GPU if there is one, else in Triton's interpreter.

Sizes are small because the interpreter takes milliseconds per program; they are chosen so that blocks are incomplete
everywhere.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_peer.ops import reference, set_table_gradient
from titan_peer.ops import triton as kernels
from titan_peer.ops.sorted_pairs import SortedPairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter's exp
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def test_the_kernels_run_here() -> None:
    assert kernels.unavailable_reason(DEVICE) is None


def random_shapes(count: int) -> list[tuple[int, ...]]:
    """(T, K, N, E, D, D_out), small, mostly not powers of two."""
    draw = random.Random(1)
    sizes = (lambda: draw.randint(1, 9), lambda: draw.randint(1, 11), lambda: draw.randint(1, 40))
    return [
        (*(size() for size in sizes), draw.choice([1, 1, 2, 3]), draw.randint(1, 70), draw.randint(1, 70))
        for _ in range(count)
    ]


SHAPES = [
    (1, 6, 40, 1, 32, 32),  # one token: its places are split over programs
    (7, 1, 5, 3, 17, 9),  # one expert per token
    (5, 3, 1, 1, 5, 5),  # one expert in all
    (20, 4, 1, 2, 24, 24),  # ... chosen by all tokens
    (0, 3, 4, 1, 8, 8),  # no token
    (4, 16, 3, 1, 33, 130),  # every expert several times per token
    *random_shapes(8),
]


def inputs(T: int, K: int, N: int, E: int, D: int, D_out: int) -> tuple[Tensor, ...]:
    """x, indices with absent places, gates, both tables, dy."""
    indices = torch.randint(0 if N == 1 else -1, N, (T, K))
    return (
        torch.randn(T, D),
        indices,
        torch.rand(T, K),
        torch.randn(N, E, D),
        torch.randn(N, E, D_out),
        torch.randn(T, D_out),
    )


def trimmed(pairs: SortedPairs) -> SortedPairs:
    """Without the undefined entries after the present pairs and runs."""
    R = int(pairs.num_rows)
    P = int(pairs.run_starts[R])
    return SortedPairs(pairs.order[:P], pairs.row_ids[:R], pairs.run_starts[: R + 1], pairs.num_rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_equal_the_reference(shape: tuple[int, ...]) -> None:
    x, indices, gates, down, up, dy = inputs(*shape)
    activation = ("gelu", "gelu_tanh", "relu", "silu")[sum(shape) % 4]
    y, z = kernels.peer_forward(x, indices, gates, down, up, activation)
    wide = [t.double() for t in (x, gates, down, up, dy)]
    y64, z64 = reference.peer_forward(wide[0], indices, wide[1], wide[2], wide[3], activation)
    torch.testing.assert_close((y.double(), z.double()), (y64, z64), rtol=1e-4, atol=1e-4)
    ours = kernels.peer_backward(dy, x, indices, gates, z, down, up, activation)
    theirs = reference.peer_backward(wide[4], wide[0], indices, wide[1], z.double(), wide[2], wide[3], activation)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our.double(), their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations_and_their_derivatives_equal_float64_far_from_zero_too(activation: str) -> None:
    z = torch.linspace(-12, 12, 97)
    indices, ones = torch.arange(97)[None], torch.ones(1, 97)
    down, up = z.view(97, 1, 1), torch.eye(97).view(97, 1, 97)  # y[n] = act(z[n]), and dz its slope
    y, made = kernels.peer_forward(torch.ones(1, 1), indices, ones, down, up, activation)
    assert torch.equal(made.flatten(), z)
    wide = z.double().requires_grad_()
    exact = reference.activate(wide, activation)
    torch.testing.assert_close(y.flatten().double(), exact.detach(), rtol=1e-5, atol=1e-6)
    _, _, dz, _ = kernels.peer_backward(ones, torch.ones(1, 1), indices, ones, made, down, up, activation)
    exact.sum().backward()
    torch.testing.assert_close(dz.flatten().double(), wide.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_one_percent_of_float64(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    x, indices, gates, down, up, dy = inputs(6, 5, 30, 1, 96, 96)
    x, dy, down, up = x.to(dtype), dy.to(dtype), down.to(table_dtype), up.to(table_dtype)
    y, z = kernels.peer_forward(x, indices, gates, down, up, "gelu")
    wide = [t.double() for t in (x, gates, down, up, dy)]
    exact, z64 = reference.peer_forward(wide[0], indices, wide[1], wide[2], wide[3], "gelu")
    assert y.dtype == dtype and z.dtype == torch.float32
    assert (y.double() - exact).norm() / exact.norm() < 1e-2
    ours = kernels.peer_backward(dy, x, indices, gates, z, down, up, "gelu")
    theirs = reference.peer_backward(wide[4], wide[0], indices, wide[1], z64, wide[2], wide[3], "gelu")
    assert ours[0].dtype == dtype
    for our, their in zip(ours, theirs):
        assert (our.double() - their).norm() / their.norm() < 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_table_gradients_equal_the_dense_ones(shape: tuple[int, ...]) -> None:
    T, K, N, E, D, _ = shape
    vectors, indices, *_ = inputs(*shape)
    weights = torch.randn(T, K, E)
    expected = torch.zeros(N + 1, E, D, dtype=torch.float64)  # the last row gets the absent places
    outer = weights.double()[..., None] * vectors.double()[:, None, None]
    expected.index_add_(0, indices.flatten() % (N + 1), outer.flatten(0, 1))
    expected = expected[:N]
    pairs = kernels.sort_pairs(indices, N)
    known = reference.sort_pairs(indices, N)
    assert all(torch.equal(a.long(), b.long()) for a, b in zip(trimmed(pairs), known))
    dense, atomic, compact = torch.zeros(N, E, D), torch.zeros(N, E, D), torch.zeros(int(pairs.num_rows), E, D)
    kernels.table_gradient(pairs, weights, vectors, dense)
    kernels.table_gradient(pairs, weights, vectors, compact, compact=True)
    set_table_gradient("atomic")
    kernels.dense_gradients(indices, [(weights, vectors, atomic)])
    set_table_gradient("sorted")
    for ours, theirs in ((dense, expected), (atomic, expected), (compact, expected[known.row_ids.long()])):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    norm = kernels.row_norm_squared(pairs, weights, vectors)
    assert norm.item() == pytest.approx(expected.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("shape", [(16, 4, 40, 1, 24, 0), (9, 3, 12, 2, 33, 0), (30, 4, 1, 3, 7, 0)], ids=str)
def test_rowwise_adamw_equals_the_reference(shape: tuple[int, ...], second_moment: str) -> None:
    T, K, N, E, D, _ = shape
    indices, vectors = torch.randint(-1, max(N // 2, 1), (T, K)), torch.randn(T, D)
    start = torch.randn(N, E, D)
    states = []
    for backend in (kernels, reference):
        second = torch.zeros(N) if second_moment == "row" else torch.zeros(N, E, D)
        state = [start.clone(), torch.zeros(N, E, D), second]
        pairs = backend.sort_pairs(indices, N)
        torch.manual_seed(1)
        for step in range(1, 4):
            corrections = {"bias_correction1": 1 - 0.9**step, "bias_correction2": 1 - 0.95**step, "seed": step}
            scale = torch.tensor(0.7) if step > 1 else 0.7
            backend.rowwise_adamw_(
                *state, pairs, torch.randn(T, K, E), vectors, grad_scale=scale, **ADAMW, **corrections
            )
        states.append(state)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    untouched = sorted(set(range(N)) - set(indices.flatten().tolist()))
    assert torch.equal(states[0][0][untouched], start[untouched])


def test_a_row_longer_than_a_block_gets_its_mean_square_from_the_whole_row() -> None:
    T, K, N, D = 3, 2, 4, 5000
    indices, vectors, weights = torch.randint(N, (T, K)), torch.randn(T, D), torch.randn(T, K, 1)
    states = [[torch.zeros(N, 1, D), torch.zeros(N, 1, D), torch.zeros(N)] for _ in range(2)]
    for backend, state in zip((kernels, reference), states):
        pairs = backend.sort_pairs(indices, N)
        corrections = {"bias_correction1": 0.1, "bias_correction2": 0.05, "seed": 1, "grad_scale": 1.0}
        backend.rowwise_adamw_(*state, pairs, weights, vectors, **ADAMW, **corrections)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_rounded_stochastically_and_repeatably() -> None:
    """One step from zero: the first moment is 0.1 x gradient, and the mean of many roundings must be that value, not
    its nearest bfloat16; neighbouring elements, rows and the two moments must be rounded independently."""
    N, D = 8, 1024
    indices, weights = torch.arange(N).view(N, 1), torch.ones(N, 1, 1)
    vectors = torch.full((N, D), 1.0037)
    states = []
    for seed in (5, 5, 6):
        state = [torch.zeros(N, 1, D, dtype=torch.bfloat16) for _ in range(3)]
        corrections = {"bias_correction1": 0.1, "bias_correction2": 0.05, "grad_scale": 1.0}
        pairs = kernels.sort_pairs(indices, N)
        kernels.rowwise_adamw_(*state, pairs, weights, vectors, **ADAMW, **corrections, seed=seed)
        states.append(state)
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1]))
    assert not torch.equal(states[0][1], states[2][1])
    for moment, exact in ((states[0][1], 0.1 * 1.0037), (states[0][2], 0.05 * 1.0037**2)):
        values = moment.float().flatten()
        below, above = values.unique().tolist()
        assert below < exact < above  # its two neighbours
        share, expected = (values == above).float().mean().item(), (exact - below) / (above - below)
        assert abs(share - expected) < 4 * (0.25 / values.numel()) ** 0.5
    up = [(t.float() > t.float().mean()).float().view(N, D) for t in states[0][1:]]
    for a, b in ((up[0], up[1]), (up[0][:, 1:], up[0][:, :-1]), (up[0][1:], up[0][:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_nan_gradients_stay_nan_in_bfloat16() -> None:
    state = [torch.zeros(2, 1, 8, dtype=torch.bfloat16) for _ in range(3)]
    vectors = torch.full((1, 8), float("nan"))
    # every bit set, as NVIDIA GPUs make it; adding to it would overflow to zero
    vectors.view(torch.int32).fill_(0x7FFFFFFF)
    pairs = kernels.sort_pairs(torch.tensor([[1]]), 2)
    corrections = {"bias_correction1": 0.1, "bias_correction2": 0.05, "grad_scale": 1.0, "seed": 1}
    kernels.rowwise_adamw_(*state, pairs, torch.ones(1, 1, 1), vectors, **ADAMW, **corrections)
    assert all(t[1].isnan().all() and not t[0].isnan().any() for t in state)


RETRIEVALS = [
    (9, 2, [64, 70], 32, 16),  # by tiles
    (5, 1, [300], 24, 16),
    (1, 1, [1], 2, 1),
    (7, 3, [7, 9], 8, 5),  # short axes: stored scores
    (6, 2, [2, 2, 3, 2], 8, 20),
    (5, 2, [80, 5, 33], 15, 7),
    (0, 2, [4, 4], 4, 3),
]


@pytest.fixture
def tensor_core_products() -> Iterator[None]:
    """Allows TF32, which is exact for float32 numbers that bfloat16 could hold; without it float32 goes by stored
    scores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def like_bfloat16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().float()


@pytest.mark.parametrize(("T", "H", "sizes", "Q", "k"), RETRIEVALS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("tensor_core_products")
def test_retrieval_equals_the_reference(T: int, H: int, sizes: list[int], Q: int, k: int, shared: bool) -> None:
    queries = like_bfloat16(T, H, Q)
    sub_keys = [like_bfloat16(1 if shared else H, n, Q // len(sizes)) for n in sizes]
    check_retrieval(queries, sub_keys, k)


def test_retrieval_in_full_float32_equals_the_reference() -> None:
    check_retrieval(torch.randn(6, 2, 32), [torch.randn(2, 70, 16) for _ in range(2)], 9)


def check_retrieval(queries: Tensor, sub_keys: list[Tensor], k: int) -> None:
    values, indices = kernels.retrieve_forward(queries, sub_keys, k)
    expected, expected_indices = reference.retrieve_forward(queries.double(), [s.double() for s in sub_keys], k)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, expected_indices)
    dvalues = torch.randn(*indices.shape)
    ours = kernels.retrieve_backward(dvalues, indices, queries, sub_keys)
    theirs = reference.retrieve_backward(dvalues, indices, queries, sub_keys)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("tensor_core_products")
def test_retrieval_of_equal_scores_gives_different_experts() -> None:
    queries, keys = torch.ones(3, 1, 8), [torch.ones(1, 65, 4), torch.ones(1, 65, 4)]
    values, indices = kernels.retrieve_forward(queries, keys, 9)
    assert values.eq(8).all()
    assert all(len(set(row)) == 9 and min(row) >= 0 and max(row) < 65 * 65 for row in indices.flatten(0, 1).tolist())


@pytest.mark.usefixtures("tensor_core_products")
def test_retrieval_does_not_hide_scores_that_are_not_numbers() -> None:
    queries, keys = torch.randn(2, 1, 8), [torch.randn(1, 65, 4) for _ in range(2)]
    queries[1] = float("nan")
    values, indices = kernels.retrieve_forward(queries, keys, 3)
    assert values[0].isfinite().all() and not values[1].isfinite().any()
    assert indices.min() >= 0 and indices.max() < 65 * 65


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_retrieval_in_low_precision_is_within_one_percent_of_float64(dtype: torch.dtype) -> None:
    queries = torch.randn(5, 2, 32).to(dtype)
    sub_keys = [torch.randn(2, 64, 16).to(dtype) for _ in range(2)]
    values, indices = kernels.retrieve_forward(queries, sub_keys, 8)
    exact, _ = reference.retrieve_forward(queries.double(), [s.double() for s in sub_keys], 8)
    assert (values.double() - exact).norm() / exact.norm() < 1e-2
    dvalues = torch.randn(5, 2, 8)
    dqueries, dkeys = kernels.retrieve_backward(dvalues, indices, queries, sub_keys)
    exact_dq, exact_dk = reference.retrieve_backward(
        dvalues.double(), indices, queries.double(), [s.double() for s in sub_keys]
    )
    assert dqueries.dtype == dkeys[0].dtype == dtype
    for ours, theirs in zip((dqueries, *dkeys), (exact_dq, *exact_dk)):
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2


def everything(x: Tensor, indices: Tensor, gates: Tensor, down: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
    """Every result of one step of the operators."""
    N = down.shape[0]
    y, z = kernels.peer_forward(x, indices, gates, down, up, "gelu")
    dx, dgates, dz, hidden = kernels.peer_backward(dy, x, indices, gates, z, down, up, "gelu")
    ddown, dup = torch.zeros_like(down), torch.zeros_like(up)
    kernels.dense_gradients(indices, [(dz, x, ddown), (hidden, dy, dup)])
    pairs = kernels.sort_pairs(indices, N)
    norm = kernels.row_norm_squared(pairs, dz, x)
    state = [down.clone(), torch.zeros_like(down), torch.zeros(N)]
    corrections = {"bias_correction1": 0.1, "bias_correction2": 0.05, "seed": 1}
    kernels.rowwise_adamw_(*state, pairs, dz, x, grad_scale=norm.rsqrt(), **ADAMW, **corrections)
    queries, sub_keys = x.view(x.shape[0], 2, -1), [down[:, 0, :8].reshape(1, N, 8), up[:, 0, :8].reshape(1, N, 8)]
    values, chosen = kernels.retrieve_forward(queries, sub_keys, 5)
    dqueries, dkeys = kernels.retrieve_backward(values, chosen, queries, sub_keys)
    return [y, z, dx, dgates, dz, hidden, ddown, dup, norm, *state, values, chosen, dqueries, *dkeys]


@pytest.mark.usefixtures("tensor_core_products")
def test_a_step_repeats_bit_for_bit() -> None:
    arguments = inputs(5, 4, 40, 1, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(everything(*arguments), everything(*arguments)))


class NoWaiting(TorchDispatchMode):
    """Raises an error where the host would wait for a device: reading a value, or a result whose length depends on
    values."""

    waits = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::_unique2", "aten::unique_consecutive")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func._schema.name not in self.waits, func
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("tensor_core_products")
def test_a_step_never_waits_for_the_device() -> None:
    arguments = inputs(2, 3, 40, 1, 32, 32)
    everything(*arguments)  # tables of candidate ranks are copied to the device once
    with NoWaiting():
        everything(*arguments)


def test_kernels_compile_for_an_h100_with_wide_loads_and_without_spilling(tmp_path: Path) -> None:
    """The compiler needs no GPU. Rows of tables are read in 16-byte accesses; no register is spilled to memory."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 16
    for kernel, made in results.items():
        assert made["spilled"] == 0 and made["registers"] <= 168, (kernel, made)
        if kernel not in ("mark_runs", "best_combinations", "mark_used"):
            assert 128 in made["widths"]["ld"], (kernel, made)
    widths = results["add_gradient"]["widths"]
    assert (widths.get("red") or widths.get("atom")) == [128]  # Triton 3.6 returns the sum, which is not used
