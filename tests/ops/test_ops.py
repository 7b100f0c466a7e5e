"""The C++ kernels compared with the plain PyTorch reference, and both with brute force."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from titan_peer.ops import RowGradients, cpu, peer_experts, product_key_retrieve, product_key_topk, reference
from titan_peer.ops.sorted_pairs import SortedPairs


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_kernels_compile_here() -> None:
    assert cpu.unavailable_reason() is None


@pytest.mark.parametrize("sizes", [[37], [7, 9], [5, 4, 6], [2, 5, 3, 4], [1]])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_topk_equals_brute_force_over_all_combinations(sizes: list[int], k: int) -> None:
    scores = [torch.randn(6, n, dtype=torch.float64).mul(3).round() for n in sizes]  # rounded: many ties
    total = torch.stack(
        [sum(s[:, i] for s, i in zip(scores, place)) for place in itertools.product(*map(range, sizes))], dim=1
    )
    if k > total.shape[1]:
        with pytest.raises(ValueError, match="k = "):
            product_key_topk(scores, k)
        return
    values, indices = product_key_topk(scores, k)
    assert torch.equal(values, total.topk(k).values)
    assert torch.equal(total.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


RETRIEVALS = [(50, 3, [7, 9], 8, 5), (200, 2, [64, 64], 32, 16), (33, 2, [5, 4, 6], 12, 9), (10, 1, [300], 16, 16)]
RETRIEVALS += [(37, 3, [1024, 515], 16, 16), (1, 8, [1000, 1024], 32, 16), (20, 2, [400, 129, 3], 12, 32)]
RETRIEVALS += [(5, 3, [700, 90], 8, 40), (70, 1, [333, 77], 8, 2), (3, 5, [257, 66], 8, 3)]
RETRIEVALS += [(1, 1, [1], 2, 1), (9, 2, [2, 2, 3, 2], 8, 20), (0, 2, [4, 4], 4, 3)]


@pytest.mark.parametrize(("T", "H", "sizes", "Q", "k"), RETRIEVALS)
@pytest.mark.parametrize("shared", [False, True])
def test_retrieval_kernels_equal_the_reference(T: int, H: int, sizes: list[int], Q: int, k: int, shared: bool) -> None:
    queries = torch.randn(T, H, Q)
    sub_keys = [torch.randn(1 if shared else H, n, Q // len(sizes)) for n in sizes]
    values, indices = cpu.retrieve_forward(queries, sub_keys, k)
    expected, _ = reference.retrieve_forward(queries, sub_keys, k)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    dvalues = torch.randn(T, H, k)
    ours = cpu.retrieve_backward(dvalues, indices, queries, sub_keys)
    theirs = reference.retrieve_backward(dvalues, indices, queries, sub_keys)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 16, 32, 40])
def test_retrieval_of_equal_scores_gives_different_experts_with_those_scores(k: int) -> None:
    queries = torch.ones(19, 2, 4)
    keys = [torch.randint(3, (2, n, 2)).float() for n in (300, 70)]  # five different scores per axis
    values, indices = cpu.retrieve_forward(queries, keys, k)
    best, second = (axis.sum(-1) for axis in keys)
    total = (best[:, :, None] + second[:, None, :]).flatten(1)  # [H, 300 * 70]
    assert torch.equal(values, total.topk(k).values.expand(19, -1, -1))
    assert torch.equal(total.expand(19, -1, -1).gather(2, indices), values)
    assert all(len(set(chosen)) == k for chosen in indices.flatten(0, 1).tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("k", [3, 16, 40])
def test_scores_that_are_no_numbers_stay_in_the_tables_and_in_their_head(bad: float, k: int) -> None:
    queries, sizes = torch.randn(21, 4, 8), [300, 20]
    keys = [torch.randn(4, n, 4) for n in sizes]
    clean = [axis[3:].clone() for axis in keys]
    keys[0][0, ::2], keys[0][1], keys[1][2] = bad, bad, bad
    values, indices = cpu.retrieve_forward(queries, keys, k)
    assert int(indices.min()) >= 0 and int(indices.max()) < sizes[0] * sizes[1]
    expected, _ = reference.retrieve_forward(queries[:, 3:], clean, k)
    torch.testing.assert_close(values[:, 3:], expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_both_operators_by_finite_differences() -> None:
    queries = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    keys = [torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4)]
    assert torch.autograd.gradcheck(lambda q, *ks: product_key_retrieve(q, list(ks), 3)[0], (queries, *keys))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(7, (5, 4))
    gates = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    down = torch.randn(7, 2, 6, dtype=torch.float64, requires_grad=True)
    up = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    for activation in ("gelu", "gelu_tanh", "silu"):
        assert torch.autograd.gradcheck(
            lambda *a, f=activation: peer_experts(a[0], indices, *a[1:], f), (x, gates, down, up)
        )


EXPERTS = [
    (50, 6, 40, 1, 32, 32),
    (7, 3, 5, 3, 17, 9),
    (64, 16, 5000, 1, 256, 256),
    (1, 1, 1, 1, 5, 5),
    (0, 3, 4, 1, 8, 8),
]
EXPERTS += [(300, 4, 1, 2, 24, 24)]  # one expert, chosen by all tokens


def inputs(T: int, K: int, N: int, E: int, D: int, D_out: int) -> tuple[Tensor, ...]:
    x, gates = torch.randn(T, D), torch.rand(T, K)
    return x, torch.randint(N, (T, K)), gates, torch.randn(N, E, D), torch.randn(N, E, D_out), torch.randn(T, D_out)


@pytest.mark.parametrize("shape", EXPERTS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_expert_kernels_equal_float64(shape: tuple[int, ...], activation: str) -> None:
    x, indices, gates, down, up, dy = inputs(*shape)
    y, z = cpu.peer_forward(x, indices, gates, down, up, activation)
    wide = [t.double() for t in (x, gates, down, up, dy)]
    y64, z64 = reference.peer_forward(wide[0], indices, wide[1], wide[2], wide[3], activation)
    torch.testing.assert_close((y.double(), z.double()), (y64, z64), rtol=1e-4, atol=1e-4)
    ours = cpu.peer_backward(dy, x, indices, gates, z, down, up, activation)
    theirs = reference.peer_backward(wide[4], wide[0], indices, wide[1], z.double(), wide[2], wide[3], activation)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our.double(), their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_one_percent_of_float64(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    x, indices, gates, down, up, _ = inputs(64, 16, 500, 1, 128, 128)
    x, down, up = x.to(dtype), down.to(table_dtype), up.to(table_dtype)
    y = peer_experts(x, indices, gates, down, up)
    exact, _ = reference.peer_forward(x.double(), indices, gates.double(), down.double(), up.double(), "gelu")
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("backend", [cpu, reference])
def test_the_parts_of_a_table_cut_in_three_add_up_to_the_whole(backend: ModuleType) -> None:
    """Expert parallelism needs this: all operators leave out places with a negative index."""
    x, indices, gates, down, up, dy = inputs(33, 9, 50, 2, 24, 20)
    y, z = reference.peer_forward(x, indices, gates, down, up, "gelu")
    whole = (y, *reference.peer_backward(dy, x, indices, gates, z, down, up, "gelu"))
    parts = []
    for first, last in ((0, 13), (13, 17), (17, 50)):
        local = torch.where((indices >= first) & (indices < last), indices - first, -1)
        tables = (down[first:last], up[first:last])
        y, z = backend.peer_forward(x, local, gates, *tables, "gelu")
        dx, dgates, dz, hidden = backend.peer_backward(dy, x, local, gates, z, *tables, "gelu")
        parts.append((y, dx, dgates, dz, hidden))
        pairs = backend.sort_pairs(local, last - first)
        gradient = torch.zeros_like(tables[0])
        backend.table_gradient(pairs, dz, x, gradient)
        expected = torch.zeros_like(down)
        all_pairs = reference.sort_pairs(indices, 50)
        reference.table_gradient(all_pairs, whole[3], x, expected)
        torch.testing.assert_close(gradient, expected[first:last], rtol=1e-4, atol=1e-4)
    for part, expected in zip(zip(*parts), whole):
        torch.testing.assert_close(sum(part), expected, rtol=1e-4, atol=1e-4)


def test_index_outside_the_tables_is_an_error() -> None:
    x, indices, gates, down, up, _ = inputs(4, 2, 5, 1, 8, 8)
    with pytest.raises(IndexError, match="must be at most 4"):
        peer_experts(x, indices + 5, gates, down, up)


@pytest.mark.parametrize("shape", [s for s in EXPERTS if s[0]])
def test_row_kernels_equal_the_dense_gradient(shape: tuple[int, ...]) -> None:
    T, K, N, E, D, _ = shape
    indices, weights, vectors = torch.randint(N, (T, K)), torch.randn(T, K, E), torch.randn(T, D)
    dense = torch.zeros(N, E, D, dtype=torch.float64)
    outer = weights.double()[..., None] * vectors.double()[:, None, None]
    dense.index_add_(0, indices.flatten(), outer.flatten(0, 1))
    pairs = cpu.sort_pairs(indices, N)
    assert all(torch.equal(a.long(), b.long()) for a, b in zip(pairs, reference.sort_pairs(indices, N)))
    for backend in (cpu, reference):
        out = torch.zeros(N, E, D)
        backend.table_gradient(pairs, weights, vectors, out)
        torch.testing.assert_close(out.double(), dense, rtol=1e-4, atol=1e-4)
        norm = backend.row_norm_squared(pairs, weights, vectors)
        assert norm.item() == pytest.approx(dense.square().sum().item(), rel=1e-5)


def adamw_steps(backend: object, pairs: SortedPairs, weights: Tensor, vectors: Tensor, state: list[Tensor]) -> None:
    for step in range(1, 6):
        backend.rowwise_adamw_(
            *state,
            pairs,
            weights * step,
            vectors,
            grad_scale=0.7,
            lr=1e-2,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            bias_correction1=1 - 0.9**step,
            bias_correction2=1 - 0.95**step,
            seed=step,
        )


@pytest.mark.parametrize("backend", [cpu, reference])
def test_rowwise_adamw_is_torchs_adamw_on_touched_rows_and_leaves_the_others(backend: object) -> None:
    N, E, D = 40, 2, 24
    indices, weights, vectors = torch.randint(20, (16, 4)), torch.randn(16, 4, E), torch.randn(16, D)
    pairs = reference.sort_pairs(indices, N)
    start = torch.randn(N, E, D)
    state = [start.clone(), torch.zeros(N, E, D), torch.zeros(N, E, D)]
    adamw_steps(backend, pairs, weights, vectors, state)
    dense = torch.zeros(N, E, D)
    reference.table_gradient(pairs, weights, vectors, dense)
    expected = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        expected.grad = dense * step * 0.7
        optimizer.step()
    touched = pairs.row_ids.long()
    torch.testing.assert_close(state[0][touched], expected.data[touched], rtol=1e-4, atol=1e-5)
    untouched = sorted(set(range(N)) - set(touched.tolist()))
    assert torch.equal(state[0][untouched], start[untouched])


@pytest.mark.parametrize("per_row", [False, True])
def test_bfloat16_moments_follow_float32_ones_and_repeat_bit_for_bit(per_row: bool) -> None:
    N, D = 30, 512
    indices, weights, vectors = torch.randint(N, (64, 4)), torch.randn(64, 4, 1), torch.randn(64, D)
    pairs = reference.sort_pairs(indices, N)
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        second = torch.zeros(N) if per_row else torch.zeros(N, 1, D, dtype=dtype)
        state = [torch.zeros(N, 1, D), torch.zeros(N, 1, D, dtype=dtype), second]
        adamw_steps(cpu, pairs, weights, vectors, state)
        results.append(state)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))
    assert (results[1][0] - results[0][0]).norm() / results[0][0].norm() < 0.01


def test_factored_gradients_of_micro_batches_and_shared_layers_add_up_to_the_dense_gradient() -> None:
    N, D = 50, 16
    down, up = torch.randn(N, 2, D, requires_grad=True), torch.randn(N, 2, D, requires_grad=True)
    collector = RowGradients(down.data, up.data)
    batches = [(torch.randn(7, D), torch.randint(N, (7, 4)), torch.rand(7, 4)) for _ in range(3)]
    for x, indices, gates in batches:
        x = x.requires_grad_()
        peer_experts(x, indices, gates, down, up, row_gradients=collector).square().sum().backward()
    assert down.grad is None and up.grad is None
    rows, down_rows, up_rows = collector.materialize()
    norm = collector.norm_squared()
    for x, indices, gates in batches:
        peer_experts(x, indices, gates, down, up).square().sum().backward()
    torch.testing.assert_close(down_rows, down.grad[rows.long()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(up_rows, up.grad[rows.long()], rtol=1e-4, atol=1e-4)
    assert norm.item() == pytest.approx((down.grad.square().sum() + up.grad.square().sum()).item(), rel=1e-5)
    collector.clear()
    assert collector.is_empty


def test_a_backward_pass_whose_collector_is_gone_says_what_to_do() -> None:
    x, indices, gates, down, up, _ = inputs(4, 2, 5, 1, 8, 8)
    y = peer_experts(x.requires_grad_(), indices, gates, down, up, row_gradients=RowGradients(down, up))
    with pytest.raises(RuntimeError, match="RowGradients"):
        y.sum().backward()


def test_operators_obey_the_rules_of_custom_ops() -> None:
    x, indices, gates, down, up, _ = inputs(5, 3, 9, 1, 8, 8)
    arguments = [t.requires_grad_() if t.is_floating_point() else t for t in (x, indices, gates, down, up)]
    torch.library.opcheck(torch.ops.titan_peer.peer_experts.default, (*arguments, "gelu", None, torch.float32))
    queries, keys = torch.randn(5, 2, 8, requires_grad=True), [torch.randn(2, 6, 4) for _ in range(2)]
    torch.library.opcheck(torch.ops.titan_peer.product_key_retrieve.default, (queries, keys, 3))
