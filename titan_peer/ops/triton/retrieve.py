"""Product-key retrieval and its gradient: launches of the kernels in retrieval.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from titan_peer.ops import reference
from titan_peer.ops.triton import retrieval, tuning
from titan_peer.ops.triton.table_gradients import dense_gradients

_power_of_2 = triton.next_power_of_2


def _by_matmul(variant: str, keys: Tensor, best: int) -> bool:
    """Whether an axis' scores are stored and searched by torch.topk. They must be if the list of the best would not fit
    into registers or a tile of keys into shared memory. By rule they are for short axes, where there is little to save.
    Scores are float32 either way."""
    n, axis_dim = keys.shape[1:]
    if best > 64 or axis_dim * keys.element_size() > 512 or keys.numel() >= 2**31:  # the kernel's offsets are int32
        return True
    if variant:
        return variant == "matmul"
    return n < 4 * best


def retrieve_forward(queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    T, H, _ = queries.shape
    queries = queries.contiguous()
    sizes = tuple(keys.shape[1] for keys in sub_keys)
    best = tuple(min(k, n) for n in sizes)
    best_values = torch.empty(T * H * sum(best), dtype=torch.float32, device=queries.device)
    best_indices = torch.empty(T * H * sum(best), dtype=torch.int32, device=queries.device)
    start, begin = 0, 0
    for keys, count in zip(sub_keys, best):
        part = queries[..., start : start + keys.shape[2]]
        shape, span = (T, H, count), slice(begin, begin + T * H * count)
        _axis_topk(part, keys, best_values[span].view(shape), best_indices[span].view(shape))
        start, begin = start + keys.shape[2], span.stop
    values = torch.empty(T, H, k, dtype=torch.float32, device=queries.device)
    indices = torch.empty(T, H, k, dtype=torch.int64, device=queries.device)
    if T == 0:
        return values, indices
    ranks, offsets = _combination_tables(sizes, k, queries.device)
    M = ranks.shape[1]
    block_m = _power_of_2(M)
    block_r = max(1, 2048 // block_m)
    with torch.cuda.device_of(queries):
        retrieval.best_combinations[(triton.cdiv(T * H, block_r),)](
            best_values,
            best_indices,
            ranks,
            offsets,
            values,
            indices,
            T * H,
            C=len(sizes),
            M=M,
            K=k,
            BLOCK_R=block_r,
            BLOCK_M=block_m,
        )
    return values, indices


@functools.lru_cache(maxsize=64)
def _combination_tables(sizes: tuple[int, ...], k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Candidate ranks int32 [C, M], and int64 [C, 3]: per axis, a query's entries of the axes before it, its entries of
    this axis, and the number of sub-keys. Kept on the device, so that a step copies nothing to it."""
    best = [min(k, n) for n in sizes]
    ranks = torch.tensor(reference.candidate_ranks(tuple(best), k), dtype=torch.int32).t().contiguous()
    offsets = [[sum(best[:c]), best[c], n] for c, n in enumerate(sizes)]
    return ranks.to(device), torch.tensor(offsets, dtype=torch.int64).to(device)


def _axis_topk(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> None:
    """The best of queries [T, H, Q_c] against keys [H or 1, n, Q_c] into values float32 and indices int32 [T, H,
    best]."""
    (T, H, axis_dim), n, best = queries.shape, keys.shape[1], values.shape[2]
    problem = tuning.problem("best_sub_keys", keys, best, 1, axis_dim)
    launch = tuning.launch_for(problem, queries.device)
    if _by_matmul(launch.variant, keys, best):
        _axis_topk_by_matmul(queries, keys, values, indices)
        return
    if T == 0:
        return
    keys = keys.contiguous()
    # tf32x3 adds the products of the low-order bits that tensor cores cut off from float32
    full_precision = torch.get_float32_matmul_precision() == "highest"
    with torch.cuda.device_of(queries):
        retrieval.best_sub_keys[(triton.cdiv(T, launch.block), H)](
            queries,
            keys,
            values,
            indices,
            T,
            queries.stride(1),
            n * axis_dim if keys.shape[0] > 1 else 0,
            H=H,
            N_KEYS=n,
            Q=axis_dim,
            BEST=best,
            LIST=_power_of_2(best),
            BLOCK_T=launch.block,
            BLOCK_N=64,
            BLOCK_Q=max(16, _power_of_2(axis_dim)),
            PRECISION="tf32x3" if full_precision else "tf32",
            WIDEN=tuning.INTERPRETED,
            num_warps=launch.num_warps,
        )


_SCORE_BYTES = 1 << 28  # the most bytes of scores that exist at the same time


def _axis_topk_by_matmul(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> None:
    T, H, _ = queries.shape
    size = max(1, _SCORE_BYTES // (4 * H * keys.shape[1]))
    for t in range(0, T, size):
        span = slice(t, t + size)
        scores = torch.matmul(queries[span].transpose(0, 1).float(), keys.transpose(1, 2).float())  # [H, slice, n]
        top = scores.topk(values.shape[2], dim=-1, sorted=True)
        values[span] = top.values.transpose(0, 1)
        indices[span] = top.indices.transpose(0, 1)


def retrieve_backward(
    dvalues: Tensor, indices: Tensor, queries: Tensor, sub_keys: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    (T, H, k), Q = indices.shape, queries.shape[2]
    queries, dvalues, indices = queries.contiguous(), dvalues.contiguous(), indices.contiguous()
    dqueries, dkeys = torch.empty_like(queries), []
    flat_queries, flat_dqueries = queries.view(T * H, Q), dqueries.view(T * H, Q)
    below, start = math.prod(keys.shape[1] for keys in sub_keys), 0
    for keys in sub_keys:
        key_sets, n, axis_dim = keys.shape
        below //= n
        span = slice(start, start + axis_dim)
        key_rows = torch.empty(T * H, k, dtype=torch.int32, device=queries.device)
        block_q = _power_of_2(axis_dim)
        block_r = max(1, 1024 // block_q)
        if T:
            with torch.cuda.device_of(queries):
                retrieval.sum_sub_keys[(triton.cdiv(T * H, block_r),)](
                    dvalues,
                    indices,
                    keys.contiguous(),
                    flat_dqueries[:, span],
                    key_rows,
                    T * H,
                    flat_dqueries.stride(0),
                    below,
                    n if key_sets > 1 else 0,
                    H=H,
                    N_KEYS=n,
                    K=k,
                    Q=axis_dim,
                    BLOCK_R=block_r,
                    BLOCK_Q=block_q,
                )
        gradient = torch.zeros(key_sets * n, 1, axis_dim, dtype=torch.float32, device=queries.device)
        dense_gradients(key_rows, [(dvalues.view(T * H, k, 1), flat_queries[:, span], gradient)])
        dkeys.append(gradient.view_as(keys).to(keys.dtype))
        start += axis_dim
    return dqueries, dkeys
