"""Kernels that make a table's gradient rows from their factors, and store them, add them atomically, or sum their
squares.

The gradient of table row n is the sum, over its run of sorted pairs, of weight x vector. A table [N, E, D] is treated
as N * E rows of D numbers, and a row as blocks of BLOCK_D. Programs are persistent: the number of rows is read on the
device, so that the host never waits for it, and a fixed grid steps through the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gradient_block(
    order_ptr,
    weight_ptr,
    vector_ptr,
    vector_stride,
    first,
    last,
    e,
    d,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32 [BLOCK_D]: sum over the pairs first..last-1 of weight[pair, e] * vector[pair // K, d], BLOCK_P pairs at a
    time, always in the same order."""
    total = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for begin in range(first, last, BLOCK_P):
        i = begin + tl.arange(0, BLOCK_P)
        inside = i < last
        pair = tl.load(order_ptr + i, mask=inside, other=0)
        weight = tl.load(weight_ptr + pair.to(tl.int64) * E + e, mask=inside, other=0.0).to(tl.float32)
        place = (pair // K).to(tl.int64)[:, None] * vector_stride + d[None, :]
        vector = tl.load(vector_ptr + place, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        total += weight[:, None] * vector.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["split_stride"])
def write_gradient(
    order_ptr,
    row_id_ptr,
    run_start_ptr,
    num_rows_ptr,
    weight_ptr,
    vector_ptr,
    out_ptr,
    vector_stride,
    split_stride,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    COMPACT: tl.constexpr,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient rows into out, [N, E, D] or (COMPACT) [R, E, D]; with SPLITS > 1 into [SPLITS, N, E, D], to be summed;
    with ADD added to its contents.

    Grid: any number of programs. A program owns every num_programs-th block of BLOCK_D numbers of the gradient rows.
    With SPLITS > 1, that many programs share a run, for tables of few rows with long runs. Reads: each pair's place,
    weight and BLOCK_D numbers of its vector. Writes: BLOCK_D numbers.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    units = tl.load(num_rows_ptr).to(tl.int64) * (E * blocks * SPLITS)
    for unit in range(tl.program_id(0).to(tl.int64), units, tl.num_programs(0)):
        split = unit % SPLITS
        block = unit // SPLITS % blocks
        e = unit // (SPLITS * blocks) % E
        run = unit // (SPLITS * blocks * E)
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        start = tl.load(run_start_ptr + run)
        length = tl.load(run_start_ptr + run + 1) - start
        first = start + (length * split // SPLITS).to(tl.int32)
        last = start + (length * (split + 1) // SPLITS).to(tl.int32)
        gradient = gradient_block(
            order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D, BLOCK_P, BLOCK_D
        )
        row = run if COMPACT else tl.load(row_id_ptr + run).to(tl.int64)
        to = out_ptr + split * split_stride + (row * E + e) * D + d
        if ADD:
            gradient += tl.load(to, mask=d < D, other=0.0).to(tl.float32)
        tl.store(to, gradient.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["num_pairs"])
def add_gradient(
    index_ptr,
    weight_ptr,
    vector_ptr,
    out_ptr,
    vector_stride,
    num_pairs,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds weight x vector of unsorted pairs to float32 out [N, E, D], atomically: the order of sums differs between
    runs.

    Grid: (ceil(P / BLOCK_P), E * ceil(D / BLOCK_D)). A program owns BLOCK_P pairs and BLOCK_D numbers of each pair's
    row. Reads: index [P], weight [P, E], the pairs' vectors. Writes: BLOCK_P x BLOCK_D atomic additions.
    """
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    e = tl.program_id(1) % E
    d = tl.program_id(1) // E * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.load(index_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int64)
    present = expert >= 0
    weight = tl.load(weight_ptr + pair.to(tl.int64) * E + e, mask=present, other=0.0).to(tl.float32)
    mask = present[:, None] & (d < D)[None, :]
    place = (pair // K).to(tl.int64)[:, None] * vector_stride + d[None, :]
    vector = tl.load(vector_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(
        out_ptr + (expert * E + e)[:, None] * D + d[None, :], weight[:, None] * vector, mask=mask, sem="relaxed"
    )


@triton.jit
def sum_squares(
    order_ptr,
    run_start_ptr,
    num_rows_ptr,
    weight_ptr,
    vector_ptr,
    out_ptr,
    vector_stride,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of squares of gradient rows, as one float64 per program.

    Grid: any number of programs (the same number gives the same sum). A program owns every num_programs-th block of the
    gradient rows, makes it, squares it and discards it. Reads: as write_gradient. Writes: out float64 [num_programs].
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    units = tl.load(num_rows_ptr).to(tl.int64) * (E * blocks)
    total = tl.full((), 0.0, dtype=tl.float64)
    for unit in range(tl.program_id(0).to(tl.int64), units, tl.num_programs(0)):
        d = unit % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        e = unit // blocks % E
        run = unit // (blocks * E)
        first, last = tl.load(run_start_ptr + run), tl.load(run_start_ptr + run + 1)
        gradient = gradient_block(
            order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D, BLOCK_P, BLOCK_D
        )
        total += tl.sum(gradient * gradient, axis=0).to(tl.float64)
    tl.store(out_ptr + tl.program_id(0), total)
