"""Kernels of product-key retrieval: the best sub-keys of an axis, the best combinations of axes, gradients of queries.

Only one tile of an axis' scores exists at a time, in registers, with a running list of the best; [T, H, C, n] is never
stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
