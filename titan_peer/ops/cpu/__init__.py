"""The CPU backend: the functions of `reference`, computed by the C++ kernels in this folder."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from titan_peer.ops import reference
from titan_peer.ops.checks import require_adamw_state, require_momentum, require_pairs_fit
from titan_peer.ops.cpu import build
from titan_peer.ops.missed_steps import MissedSteps
from titan_peer.ops.sorted_pairs import SortedPairs

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SCORE_ELEMENTS = 1 << 20  # scores per slice: 4 MiB, so that they are still in cache when the best are chosen


@cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None if they can."""
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None


def description() -> str:
    if build.load().titan_peer_has_threads():
        return f"C++ kernels ({torch.get_num_threads()} threads)"
    return "C++ kernels (one thread: the compiler has no OpenMP)"


def _call(name: str, *arguments: Tensor | int | float | None) -> int:
    """Call a kernel: tensors as pointers to their data, integers as int64, floats as float32.

    Raises:
        ValueError: a tensor is not contiguous, aligned CPU memory.
    """
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_contiguous() or argument.device.type != "cpu":
                where = f"strides {argument.stride()} on {argument.device}"
                raise ValueError(f"{name}: a tensor {list(argument.shape)} has {where}, must be contiguous on cpu")
            if argument.data_ptr() % argument.element_size():
                raise ValueError(
                    f"{name}: a tensor {list(argument.shape)} lies at an address that is not a multiple of its element size"
                )
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif argument is None:
            converted.append(ctypes.c_void_p(None))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    function = getattr(build.load(), name)
    function.restype = ctypes.c_int64
    return int(function(*converted, ctypes.c_int64(torch.get_num_threads())))


def _float(t: Tensor) -> Tensor:
    return t.float().contiguous()


def _int64(t: Tensor) -> Tensor:
    return t.long().contiguous()


def _int32(t: Tensor) -> Tensor:
    return t.int().contiguous()


def peer_forward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    (T, K), (N, E, D), O = indices.shape, down.shape, up.shape[2]
    y, z = torch.empty(T, O), torch.empty(T, K, E)
    shape = (T, K, N, E, D, O)
    kernel, dtype = "titan_peer_forward", _DTYPES[down.dtype]
    tables = (down.contiguous(), up.contiguous())
    outside = _call(
        kernel, dtype, _float(x), _int64(indices), _float(gates), *tables, y, z, *shape, _ACTIVATIONS[activation]
    )
    if outside:
        raise IndexError(f"indices: up to {int(indices.max())}; must be at most {N - 1}")
    return y.to(sum_dtype or x.dtype), z


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
    (T, K), (_, E, D), O = indices.shape, down.shape, up.shape[2]
    dx, dgates, dz, hidden = torch.empty(T, D), torch.empty(T, K), torch.empty_like(z), torch.empty_like(z)
    inputs = (_float(dy), _int64(indices), _float(gates), _float(z), down.contiguous(), up.contiguous())
    _call(
        "titan_peer_backward",
        _DTYPES[down.dtype],
        *inputs,
        dx,
        dgates,
        dz,
        hidden,
        *(T, K, E, D, O, _ACTIVATIONS[activation]),
    )
    return dx.to(sum_dtype or x.dtype), dgates.to(gates.dtype), dz, hidden


def sort_pairs(indices: Tensor, num_experts: int) -> SortedPairs:
    P = indices.numel()
    require_pairs_fit(P, num_experts)
    scratch = torch.empty(4, P, dtype=torch.int32)
    order, row_ids = torch.empty(P, dtype=torch.int32), torch.empty(P, dtype=torch.int32)
    run_starts = torch.empty(P + 1, dtype=torch.int32)
    R = _call(
        "titan_peer_sort_pairs",
        _int64(indices),
        P,
        num_experts,
        scratch[:2],
        scratch[2:],
        order,
        row_ids,
        run_starts,
    )
    if R < 0:
        raise IndexError(f"indices: up to {int(indices.max())}; must be at most {num_experts - 1}")
    return SortedPairs(order[: int(run_starts[R])], row_ids[:R], run_starts[: R + 1], torch.tensor(R))


def _factors(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> tuple[int, Tensor, Tensor, tuple[int, ...]]:
    K, E = weights.shape[1:]
    return pairs.row_ids.numel(), _float(weights), _float(vectors), (K, E, vectors.shape[1])


def _runs(pairs: SortedPairs) -> tuple[Tensor, Tensor, Tensor]:
    return _int32(pairs.order), _int32(pairs.row_ids), _int32(pairs.run_starts)


def table_gradient(
    pairs: SortedPairs, weights: Tensor, vectors: Tensor, out: Tensor, *, compact: bool = False, add: bool = False
) -> None:
    R, weights, vectors, shape = _factors(pairs, weights, vectors)
    wide = out if out.dtype == torch.float32 else torch.zeros(out.shape)
    runs = (*_runs(pairs), R)
    _call("titan_peer_table_gradient", *runs, weights, vectors, wide, int(compact), int(add), *shape)
    if wide is not out:
        out.copy_(wide)


def dense_gradients(indices: Tensor, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    pairs = sort_pairs(indices, factors[0][2].shape[0])
    for weights, vectors, out in factors:
        table_gradient(pairs, weights, vectors, out)


def row_norm_squared(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Tensor:
    R, weights, vectors, shape = _factors(pairs, weights, vectors)
    squares = torch.empty(R, dtype=torch.float64)
    _call("titan_peer_row_norms", _int32(pairs.order), _int32(pairs.run_starts), R, weights, vectors, squares, *shape)
    return squares.sum().float()


def _missed(missed: MissedSteps | None) -> tuple[Tensor | int | float | None, ...]:
    """What the kernels of updates.cpp take for missed steps: last_use, step, table, its length, three logarithms."""
    if missed is None:
        return None, 0, None, 0, 0.0, 0.0, 0.0
    table = missed.table()
    return missed.last_use, missed.step, table, table.shape[0], *missed.log2()


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
    R, weights, vectors, shape = _factors(pairs, weights, vectors)
    per_row = exp_avg_sq.ndim == 1
    second_moment = (None, exp_avg_sq) if per_row else (exp_avg_sq, None)
    moments = (param, exp_avg, *second_moment)
    runs = (*_runs(pairs), R, weights, vectors)
    step_size, decay = lr / bias_correction1, 1 - lr * weight_decay
    numbers = (float(grad_scale), step_size, beta1, beta2, eps, decay, math.sqrt(bias_correction2))
    require_adamw_state(param, exp_avg, exp_avg_sq)
    _call(
        "titan_peer_rowwise_adamw",
        _STATE_DTYPES[param.dtype],
        _STATE_DTYPES[exp_avg.dtype],
        *moments,
        *runs,
        *shape,
        *map(float, numbers),
        *_missed(missed),
        seed,
    )


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
    R, weights, vectors, shape = _factors(pairs, weights, vectors)
    require_momentum(param, momentum)
    dtypes = (_STATE_DTYPES[param.dtype], 0 if momentum is None else _STATE_DTYPES[momentum.dtype])
    numbers = map(float, (grad_scale, step_size, beta, eps, decay))
    runs = (*_runs(pairs), R, weights, vectors)
    _call("titan_peer_rowwise_normalized", *dtypes, param, momentum, *runs, *shape, *numbers, *_missed(missed), seed)


@cache
def _candidates(best_k: tuple[int, ...], k: int) -> Tensor:
    return torch.tensor(reference.candidate_ranks(best_k, k), dtype=torch.int32)


def retrieve_forward(queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    T, H, _ = queries.shape
    sizes = [keys.shape[1] for keys in sub_keys]
    best_k = [min(k, n) for n in sizes]
    ranks = _candidates(tuple(best_k), k)
    values, indices = torch.empty(T, H, k), torch.empty(T, H, k, dtype=torch.int64)
    slice_size = min(max(16, _SCORE_ELEMENTS // (H * max(sizes))), max(T, 1))
    sub_keys = [_float(keys) for keys in sub_keys]
    parts = _float(queries).transpose(0, 1).split([keys.shape[2] for keys in sub_keys], dim=-1)  # C x [H, T, Q_c]
    buffers = [torch.empty(H * n * slice_size) for n in sizes]
    for t in range(0, T, slice_size):
        tokens = min(slice_size, T - t)
        scores = []
        for part, keys, n, buffer in zip(parts, sub_keys, sizes, buffers):
            axis_scores = buffer[: H * tokens * n].view(H, tokens, n)
            torch.bmm(part[:, t : t + tokens], keys.expand(H, -1, -1).transpose(1, 2), out=axis_scores)
            scores.append(axis_scores)
        pointers = torch.tensor([axis_scores.data_ptr() for axis_scores in scores], dtype=torch.int64)
        shape = (len(sub_keys), ranks, ranks.shape[0], H, tokens, k)
        results = (values[t : t + tokens], indices[t : t + tokens])
        _call("titan_peer_retrieve", pointers, torch.tensor(best_k), torch.tensor(sizes), *shape, *results)
    return values, indices


def retrieve_backward(
    dvalues: Tensor, indices: Tensor, queries: Tensor, sub_keys: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    T, H, Q = queries.shape
    # Flat, so that an axis' part is selected by where the data starts: the kernel steps from query to query by Q.
    flat_queries, flat_dqueries, dvalues = _float(queries).view(-1), torch.empty(T * H * Q), _float(dvalues)
    dkeys, places = [], torch.empty(indices.shape, dtype=torch.int32)
    stride_below, start = math.prod(keys.shape[1] for keys in sub_keys), 0
    for keys in sub_keys:
        wide_keys = _float(keys)
        gradient = torch.empty_like(wide_keys)
        stride_below //= keys.shape[1]
        shape = (T, H, indices.shape[2], *keys.shape, Q, stride_below)
        parts = (flat_queries[start:], wide_keys, flat_dqueries[start:], gradient)
        _call("titan_peer_retrieve_backward", dvalues, _int64(indices), *parts, places, *shape)
        dkeys.append(gradient.to(keys.dtype))
        start += keys.shape[2]
    return flat_dqueries.view(T, H, Q).to(queries.dtype), dkeys
