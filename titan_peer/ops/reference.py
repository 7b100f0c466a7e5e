"""The operators in plain PyTorch: the specification that every backend is tested against, and the path that runs where
no kernel does. Any device, any float dtype; slices of tokens are processed in turn, so that no [T, K, D] tensor exists.

Shapes: T tokens, H heads, k experts per head, K = H*k, N experts, E expert hidden size, D model dim, C product-key
axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_peer.ops.checks import require_pairs_fit
from titan_peer.ops.missed_steps import MissedSteps
from titan_peer.ops.sorted_pairs import SortedPairs

DAMPING = 1e-4
"""Of blocks of several rows that are orthogonalised: what is added to their mean squares, relative to these. Directions
in which a block has less than a hundredth of its typical size stay small instead of being blown up."""
ITERATIONS = 20
"""Of the inverse root: each multiplies what is small by 1.5, so 1.5^14 covers the smallest that the damping leaves of up
to 16 rows; the rest converges quadratically."""
_SLICE_ELEMENTS = 1 << 22  # the most elements in the gathered rows of a slice (16 MiB in float32)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- retrieval


@lru_cache(maxsize=64)
def candidate_ranks(sizes: tuple[int, ...], k: int) -> tuple[tuple[int, ...], ...]:
    """Ranks (from 0, one per axis) of the combinations that can be among the k best of a sum over sorted axes.

    A combination at 1-based ranks (r_1, ..., r_C) is beaten or equalled by all prod(r_c) combinations at ranks no
    larger, so only those with prod(r_c) <= k can be among the first k: 50 instead of 256 for two axes and k = 16.
    """

    def extend(prefix: tuple[int, ...], product: int) -> Iterator[tuple[int, ...]]:
        if len(prefix) == len(sizes):
            yield prefix
            return
        for rank in range(min(sizes[len(prefix)], k // product)):
            yield from extend((*prefix, rank), product * (rank + 1))

    return tuple(extend((), 1))


def check_k(sizes: Sequence[int], k: int) -> None:
    if not 1 <= k <= math.prod(sizes):
        raise ValueError(f"k = {k}: must be from 1 to the number of combinations, {' x '.join(map(str, sizes))}")


def combine_axes(best: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """From each axis' sorted best (values, indices), the k best sums and their row-major indices."""
    ranks = candidate_ranks(tuple(values.shape[-1] for values, _ in best), k)
    columns = torch.tensor(ranks, device=best[0][0].device).unbind(1)  # C x [candidates]
    sums, places = None, None
    for (values, indices), column, size in zip(best, columns, sizes):
        value, index = values[..., column], indices[..., column]
        sums = value if sums is None else sums + value
        places = index if places is None else places * size + index
    assert sums is not None and places is not None
    top = sums.topk(k, dim=-1, sorted=True)
    return top.values, places.gather(-1, top.indices)


def product_key_topk(scores: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """See `titan_peer.ops.product_key_topk`."""
    sizes = [s.shape[-1] for s in scores]
    check_k(sizes, k)
    best = [tuple(s.topk(min(k, s.shape[-1]), dim=-1, sorted=True)) for s in scores]
    return combine_axes(best, sizes, k)  # type: ignore[arg-type]


def retrieve_forward(queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Queries [T, H, Q] against C x [H or 1, n_c, Q_c] -> values [T, H, k] (float32 or 64), indices int64 [T, H, k]."""
    dtype = accumulation_dtype(queries.dtype)
    T, H, _ = queries.shape
    slice_size = max(1, _SLICE_ELEMENTS // (H * max(keys.shape[1] for keys in sub_keys)))
    values = torch.empty(T, H, k, dtype=dtype, device=queries.device)
    indices = torch.empty(T, H, k, dtype=torch.int64, device=queries.device)
    parts = queries.split([keys.shape[2] for keys in sub_keys], dim=-1)
    for t in range(0, T, slice_size):
        rows = slice(t, t + slice_size)
        scores = [
            torch.matmul(part[rows].transpose(0, 1).to(dtype), keys.transpose(1, 2).to(dtype))  # [H, slice, n_c]
            for part, keys in zip(parts, sub_keys)
        ]
        best_values, best_indices = product_key_topk(scores, k)
        values[rows], indices[rows] = best_values.transpose(0, 1), best_indices.transpose(0, 1)
    return values, indices


def axis_indices(indices: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Row-major indices split into one index per axis."""
    parts = []
    for size in reversed(sizes):
        parts.append(indices % size)
        indices = indices // size
    return parts[::-1]


def retrieve_backward(
    dvalues: Tensor, indices: Tensor, queries: Tensor, sub_keys: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of queries and sub-keys; only the k chosen sub-keys per axis take part."""
    T, H, k = indices.shape
    dtype = accumulation_dtype(queries.dtype)
    heads = torch.arange(H, device=indices.device)[None, :, None]
    dqueries, dkeys = [], []
    parts = queries.split([keys.shape[2] for keys in sub_keys], dim=-1)
    for part, keys, index in zip(parts, sub_keys, axis_indices(indices, [s.shape[1] for s in sub_keys])):
        key_sets, n, axis_dim = keys.shape
        bags = (index + (heads * n if key_sets > 1 else 0)).reshape(T * H, k)  # rows of the flattened sub-keys
        weights = dvalues.reshape(T * H, k).to(dtype)
        flat_keys = keys.reshape(key_sets * n, axis_dim).to(dtype)
        dqueries.append(F.embedding_bag(bags, flat_keys, mode="sum", per_sample_weights=weights).view(T, H, axis_dim))
        pairs = sort_pairs(bags, key_sets * n)
        flat = torch.zeros_like(flat_keys).unsqueeze(1)
        table_gradient(pairs, weights.unsqueeze(-1), part.reshape(T * H, axis_dim).to(dtype), flat)
        dkeys.append(flat.view_as(keys).to(keys.dtype))
    return torch.cat(dqueries, dim=-1).to(queries.dtype), dkeys


# ---- experts


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    raise ValueError(f"activation = {activation!r}: must be one of 'gelu', 'gelu_tanh', 'relu', 'silu'")


def activation_derivative(z: Tensor, activation: str) -> Tensor:
    """Written out, because autograd does not record inside a custom op."""
    if activation == "gelu":
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(z) + z * density
    if activation == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        t = torch.tanh(scale * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z * z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    raise ValueError(f"activation = {activation!r}: must be one of 'gelu', 'gelu_tanh', 'relu', 'silu'")


def _token_slices(T: int, K: int, row_elements: int) -> Iterator[slice]:
    size = max(1, _SLICE_ELEMENTS // max(1, K * row_elements))
    return (slice(t, min(t + size, T)) for t in range(0, T, size))


def peer_forward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, D_out] in `sum_dtype` (None: x's) and pre-activations z [T, K, E] in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    T, K = indices.shape
    y = torch.empty(T, up.shape[2], dtype=sum_dtype or x.dtype, device=x.device)
    z = torch.empty(T, K, down.shape[1], dtype=dtype, device=x.device)
    for rows in _token_slices(T, K, down.shape[1] * max(down.shape[2], up.shape[2])):
        present, chosen = (indices[rows] >= 0).unsqueeze(-1), indices[rows].clamp_min(0)
        z[rows] = torch.einsum("td,tked->tke", x[rows].to(dtype), down[chosen].to(dtype)) * present
        hidden = gates[rows].to(dtype).unsqueeze(-1) * activate(z[rows], activation)  # absent places: act(0) = 0
        y[rows] = torch.einsum("tke,tkeo->to", hidden, up[chosen].to(dtype)).to(y.dtype)
    return y, z


def peer_backward(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [T, D] in `sum_dtype` (None: x's), dgates [T, K], dz [T, K, E], and hidden = gates * act(z) [T, K, E].

    The tables' gradients are sums of outer products over the pairs (t, j) that chose n: d down[n] = sum dz x^T and
    d up[n] = sum hidden dy^T.
    """
    dtype = accumulation_dtype(x.dtype)
    dx, dgates, dz = torch.empty_like(x, dtype=sum_dtype), torch.empty_like(gates), torch.empty_like(z)
    activated = activate(z, activation)
    wide_gates = gates.to(dtype).unsqueeze(-1)
    T, K = indices.shape
    for rows in _token_slices(T, K, down.shape[1] * max(down.shape[2], up.shape[2])):
        present, chosen = (indices[rows] >= 0).unsqueeze(-1), indices[rows].clamp_min(0)
        u = torch.einsum("to,tkeo->tke", dy[rows].to(dtype), up[chosen].to(dtype)) * present
        dgates[rows] = (u * activated[rows]).sum(-1).to(gates.dtype)
        dz[rows] = wide_gates[rows] * u * activation_derivative(z[rows], activation)
        dx[rows] = torch.einsum("tke,tked->td", dz[rows], down[chosen].to(dtype)).to(dx.dtype)
    return dx, dgates, dz, wide_gates * activated


# ---- table gradients from their factors


def sort_pairs(indices: Tensor, num_experts: int) -> SortedPairs:
    """The (token, expert) pairs of indices [T, K] grouped by expert, in order of tokens within an expert; pairs with a
    negative index are left out."""
    require_pairs_fit(indices.numel(), num_experts)
    sorted_experts, order = indices.reshape(-1).sort(stable=True)
    if sorted_experts.numel() and int(sorted_experts[-1]) >= num_experts:
        raise IndexError(f"indices: up to {int(sorted_experts[-1])}; must be at most {num_experts - 1}")
    absent = int((sorted_experts < 0).sum())
    sorted_experts, order = sorted_experts[absent:], order[absent:]
    row_ids, counts = torch.unique_consecutive(sorted_experts, return_counts=True)
    run_starts = F.pad(counts.cumsum(0), (1, 0))
    num_rows = torch.tensor(row_ids.numel(), device=indices.device)
    return SortedPairs(order.int(), row_ids.int(), run_starts.int(), num_rows)


def _gradient_rows(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the touched rows with their gradients [rows, E, D]."""
    K, E = weights.shape[1:]
    order, starts = pairs.order.long(), pairs.run_starts.tolist()
    tokens, flat_weights = order // K, weights.reshape(-1, E)[order]
    limit = max(1, _SLICE_ELEMENTS // max(1, E * vectors.shape[1]))
    first, R = 0, len(starts) - 1
    while first < R:
        last = first + 1
        while last < R and starts[last + 1] - starts[first] <= limit:
            last += 1
        span = slice(starts[first], starts[last])
        runs = torch.repeat_interleave(
            torch.arange(last - first, device=order.device), pairs.run_starts[first : last + 1].long().diff()
        )
        rows = torch.zeros(last - first, E, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        rows.index_add_(0, runs, flat_weights[span].to(vectors.dtype)[:, :, None] * vectors[tokens[span]][:, None])
        yield slice(first, last), rows
        first = last


def table_gradient(
    pairs: SortedPairs, weights: Tensor, vectors: Tensor, out: Tensor, *, compact: bool = False, add: bool = False
) -> None:
    """Write gradient rows into `out`: dense [N, E, D] of zeros, or compact [R, E, D], the touched rows one after the
    other.

    With `add`, add them to the contents of a dense float32 `out`.
    """
    for rows, gradient in _gradient_rows(pairs, weights, vectors.to(accumulation_dtype(vectors.dtype))):
        where = rows if compact else pairs.row_ids[rows].long()
        out[where] = gradient.to(out.dtype) + out[where] if add else gradient.to(out.dtype)


def dense_gradients(indices: Tensor, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Dense gradients of tables of equal N; per table: weights [T, K, E], vectors [T, D], out [N, E, D] of zeros."""
    pairs = sort_pairs(indices, factors[0][2].shape[0])
    for weights, vectors, out in factors:
        table_gradient(pairs, weights, vectors, out)


def row_norm_squared(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Tensor:
    """Sum of squares over all gradient rows, 0-d float32."""
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for _, gradient in _gradient_rows(pairs, weights, vectors.to(accumulation_dtype(vectors.dtype))):
        total += gradient.double().square().sum()
    return total.float()


def rowwise_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    seed: int,
    missed: MissedSteps | None = None,
) -> None:
    """See `titan_peer.ops.rowwise_adamw_`."""
    generator = torch.Generator(param.device).manual_seed(seed)
    per_row = exp_avg_sq.ndim != param.ndim
    step_size = lr / bias_correction1

    def divided(m: Tensor, v: Tensor) -> Tensor:
        denominator = (v / bias_correction2).sqrt_().add_(eps)
        return m / (denominator[:, None, None] if per_row else denominator)

    for rows, gradient in _gradient_rows(pairs, weights, vectors.to(accumulation_dtype(vectors.dtype))):
        where = pairs.row_ids[rows].long()
        g = gradient * grad_scale
        p, m, v = param[where].to(g.dtype), exp_avg[where].to(g.dtype), exp_avg_sq[where].to(g.dtype)
        if missed is not None:
            beta1_n, beta2_n, decay_n, moved = _missed_factors(missed, where, g.dtype)
            p.mul_(decay_n).sub_(divided(m, v) * (step_size * moved))
            m.mul_(beta1_n)
            v.mul_(beta2_n[:, 0, 0] if per_row else beta2_n)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        square = g.square().mean((1, 2)) if per_row else g.square()
        v.mul_(beta2).add_(square, alpha=1 - beta2)
        p.sub_(divided(m, v), alpha=step_size)
        for table, new in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            _store(table, where, new, generator)


def rowwise_normalized_(
    param: Tensor,
    momentum: Tensor | None,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float,
    step_size: float,
    beta: float,
    eps: float,
    decay: float,
    seed: int,
    missed: MissedSteps | None = None,
) -> None:
    """See `titan_peer.ops.rowwise_normalized_`."""
    generator = torch.Generator(param.device).manual_seed(seed)
    for rows, gradient in _gradient_rows(pairs, weights, vectors.to(accumulation_dtype(vectors.dtype))):
        where = pairs.row_ids[rows].long()
        u = gradient * grad_scale
        p = param[where].to(u.dtype)
        beta_n, decay_n = torch.ones((), dtype=u.dtype), torch.ones((), dtype=u.dtype)
        if missed is not None:
            beta_n, _, decay_n, _ = _missed_factors(missed, where, u.dtype)
        if momentum is not None:
            m = (momentum[where].to(u.dtype) * beta_n).lerp_(u, 1 - beta)
            _store(momentum, where, m, generator)
            u = m.lerp_(u, 1 - beta)
        p = p * (decay_n * decay) - step_size * (inverse_root(mean_products(u, eps)) @ u)
        _store(param, where, p, generator)


def mean_products(u: Tensor, eps: float) -> Tensor:
    """A = u u^T / max(E, D) of blocks [R, E, D], made safe to invert: plus eps^2, and if E > 1 plus DAMPING times the
    mean of its diagonal, on the diagonal."""
    E, D = u.shape[1:]
    products = u @ u.transpose(1, 2) / max(E, D)
    diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal += max(eps**2, 1e-37) + (DAMPING * diagonal.mean(1, keepdim=True) if E > 1 else 0.0)
    return products


def inverse_root(a: Tensor) -> Tensor:
    """A^(-1/2) of symmetric positive definite [R, E, E], by Newton and Schulz's coupled iteration: with Y = A / tr A and
    Z = I, ITERATIONS times T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; then Z is (A / tr A)^(-1/2)."""
    if a.shape[1] == 1:
        return a.rsqrt()
    trace = a.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    unit = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    y, z = a / trace, unit.expand_as(a)
    for _ in range(ITERATIONS):
        t = 1.5 * unit - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return z * trace.rsqrt()


def _missed_factors(missed: MissedSteps, rows: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The four factors of the steps that rows [R] have missed, [R, 1, 1] each; from now on they have missed none."""
    factors = missed.factors(missed.count(rows)).to(dtype)
    missed.last_use[rows] = missed.step
    return (factor[:, None, None] for factor in factors.unbind(1))


def _store(table: Tensor, rows: Tensor, new: Tensor, generator: torch.Generator) -> None:
    table[rows] = round_stochastically(new, generator) if table.dtype == torch.bfloat16 else new.to(table.dtype)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, rounded up or down with the probabilities that make the expected value exact.

    Rounding to nearest would freeze a second moment: with beta2 = 0.999 its steps are smaller than half the spacing of
    bfloat16 numbers.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -65536).view(torch.float32).bfloat16()
