"""Product-key retrieval and its gradient: kernels for the best sub-keys of an axis, the best combinations of axes and
the gradients of queries, and the functions that launch them.

Only one tile of an axis' scores exists at a time, in registers, with a running list of the best; [T, H, C, n] is never
stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_peer.ops import reference
from titan_peer.ops.triton import tuning
from titan_peer.ops.triton.table_gradients import dense_gradients

_power_of_2 = triton.next_power_of_2


@triton.jit(do_not_specialize=["num_tokens"])
def best_sub_keys(
    query_ptr,
    key_ptr,
    value_ptr,
    index_ptr,
    num_tokens,
    query_stride,
    key_set_stride,
    H: tl.constexpr,
    N_KEYS: tl.constexpr,
    Q: tl.constexpr,
    BEST: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The BEST highest-scoring sub-keys of one axis for each query, descending.

    Grid: (ceil(T / BLOCK_T), H). A program owns BLOCK_T queries of a head and goes through all N_KEYS sub-keys, BLOCK_N
    at a time. Per query, an unsorted list of LIST >= BEST entries holds the best so far; while any score of a tile
    beats its query's worst entry, the tile's best replaces that entry. The first tile fills the list; of the j-th tile,
    about BEST / j scores enter it. Reads: its queries once, the head's sub-keys once (shared by all programs of a head,
    so from the L2 cache). Writes: value float32 and index int32 [T, H, BEST]. A NaN score counts as infinite, so that
    it is not lost. WIDEN is for the interpreter, whose dot does not support bfloat16.
    """
    h = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    q = tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_N)
    slots = tl.arange(0, LIST)
    place = t.to(tl.int64)[:, None] * query_stride * H + h * query_stride + q[None, :]
    query = tl.load(query_ptr + place, mask=(t < num_tokens)[:, None] & (q < Q)[None, :], other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    list_values = tl.full([BLOCK_T, LIST], float("-inf"), dtype=tl.float32)
    list_indices = tl.zeros([BLOCK_T, LIST], dtype=tl.int32) + slots[None, :]
    for begin in range(0, N_KEYS, BLOCK_N):
        key_place = h * key_set_stride + (begin + n)[None, :] * Q + q[:, None]
        keys = tl.load(key_ptr + key_place, mask=(begin + n < N_KEYS)[None, :] & (q < Q)[:, None], other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
        scores = tl.dot(query, keys, input_precision=PRECISION)  # [BLOCK_T, BLOCK_N]
        scores = tl.where(scores == scores, scores, float("inf"))
        scores = tl.where((begin + n < N_KEYS)[None, :], scores, float("-inf"))
        best, best_place = tl.max(scores, axis=1, return_indices=True)
        worst, worst_slot = tl.min(list_values, axis=1, return_indices=True)
        enters = best > worst
        while tl.max(enters.to(tl.int32), axis=0) > 0:
            here = enters[:, None] & (slots[None, :] == worst_slot[:, None])
            list_values = tl.where(here, best[:, None], list_values)
            list_indices = tl.where(here, (begin + best_place)[:, None], list_indices)
            scores = tl.where(enters[:, None] & (n[None, :] == best_place[:, None]), float("-inf"), scores)
            best, best_place = tl.max(scores, axis=1, return_indices=True)
            worst, worst_slot = tl.min(list_values, axis=1, return_indices=True)
            enters = best > worst
    to = (t.to(tl.int64) * H + h) * BEST
    for j in range(BEST):
        value, slot = tl.max(list_values, axis=1, return_indices=True)
        here = slots[None, :] == slot[:, None]
        tl.store(value_ptr + to + j, value, mask=t < num_tokens)
        index = tl.sum(tl.where(here, list_indices, 0), axis=1)
        tl.store(index_ptr + to + j, index, mask=t < num_tokens)
        list_values = tl.where(here, float("-inf"), list_values)


@triton.jit(do_not_specialize=["num_queries"])
def best_combinations(
    values_ptr,
    indices_ptr,
    ranks_ptr,
    offsets_ptr,
    value_ptr,
    index_ptr,
    num_queries,
    C: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The K best sums of one score per axis, descending, among M candidate combinations of ranks.

    Grid: ceil(T * H / BLOCK_R). A program owns BLOCK_R queries and takes the best of their M sums K times. Reads: ranks
    int32 [C, M]; offsets int64 [C, 3]; for each axis c the sorted best values (float32) and indices (int32). These are
    offsets[c, 1] entries per query, after the offsets[c, 0] entries per query of the earlier axes; offsets[c, 2] is the
    axis' number of sub-keys. Writes: value float32 and index int64 [T * H, K].
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    mask = (r < num_queries)[:, None] & (m < M)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    places = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.int64)
    for c in tl.static_range(C):
        begin = tl.load(offsets_ptr + 3 * c) * num_queries
        best = tl.load(offsets_ptr + 3 * c + 1)
        size = tl.load(offsets_ptr + 3 * c + 2)
        rank = tl.load(ranks_ptr + c * M + m, mask=m < M, other=0)
        entry = begin + r[:, None] * best + rank[None, :]
        sums += tl.load(values_ptr + entry, mask=mask, other=0.0)
        places = places * size + tl.load(indices_ptr + entry, mask=mask, other=0)
    sums = tl.where((m < M)[None, :], sums, float("-inf"))
    for j in range(K):
        value, candidate = tl.max(sums, axis=1, return_indices=True)
        here = m[None, :] == candidate[:, None]
        index = tl.sum(tl.where(here, places, 0), axis=1)
        tl.store(value_ptr + r * K + j, value, mask=r < num_queries)
        tl.store(index_ptr + r * K + j, index, mask=r < num_queries)
        sums = tl.where(here, float("-inf"), sums)


@triton.jit(do_not_specialize=["num_queries"])
def sum_sub_keys(
    weight_ptr,
    index_ptr,
    key_ptr,
    out_ptr,
    key_row_ptr,
    num_queries,
    out_stride,
    below,
    head_rows,
    H: tl.constexpr,
    N_KEYS: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One axis' gradient of queries: out[r] = sum_j weight[r, j] * key[row of index[r, j]]; also stores those rows'
    numbers.

    Grid: ceil(T * H / BLOCK_R). A program owns BLOCK_R queries. The sub-key of an expert is index // below % N_KEYS. If
    each head has its own sub-keys, its row is that number + head * N_KEYS (head_rows = N_KEYS); if the heads share
    them, the row is that number (head_rows = 0). Reads: weights, indices, K sub-keys of Q numbers per query. Writes:
    out, Q numbers per query, and key_row int32 [T * H, K].
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    q = tl.arange(0, BLOCK_Q)
    present = r < num_queries
    total = tl.zeros([BLOCK_R, BLOCK_Q], dtype=tl.float32)
    for j in range(K):
        weight = tl.load(weight_ptr + r * K + j, mask=present, other=0.0).to(tl.float32)
        index = tl.load(index_ptr + r * K + j, mask=present, other=0)
        row = index // below % N_KEYS + r % H * head_rows
        tl.store(key_row_ptr + r * K + j, row.to(tl.int32), mask=present)
        key = tl.load(key_ptr + row[:, None] * Q + q[None, :], mask=present[:, None] & (q < Q)[None, :], other=0.0)
        total += weight[:, None] * key.to(tl.float32)
    to = out_ptr + r[:, None] * out_stride + q[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=present[:, None] & (q < Q)[None, :])


# ---- launches


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
        best_combinations[(triton.cdiv(T * H, block_r),)](
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
        best_sub_keys[(triton.cdiv(T, launch.block), H)](
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
                sum_sub_keys[(triton.cdiv(T * H, block_r),)](
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
