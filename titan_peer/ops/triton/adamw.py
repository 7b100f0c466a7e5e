"""Kernels of the row-wise AdamW step: each touched row is read once, brought up to date, updated with its gradient from
factors, and written."""

from __future__ import annotations

import triton
import triton.language as tl

from titan_peer.ops.triton.rows import gradient_block


@triton.jit
def mix(h):
    """A hash of a uint32 in which every output bit depends on all input bits (the finaliser of MurmurHash3)."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def narrow(value, noise, dtype: tl.constexpr):
    """float32 -> dtype; bfloat16 is rounded up or down by 16 bits of noise, so that the expected value is exact."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        # a NaN's bits are all ones on NVIDIA GPUs: adding to them would make it a zero
        return tl.where(value == value, rounded, value).to(tl.bfloat16)
    else:
        return value.to(dtype)


@triton.jit
def missed_factors(last_use_ptr, factor_ptr, num_factors, step, log2_beta1, log2_beta2, log2_decay, row):
    """What the steps that a row has missed leave of its moments and weights, and how far they have moved it
    (ops/missed_steps.py): four float32."""
    steps = step - 1 - tl.load(last_use_ptr + row)
    known = tl.minimum(steps, num_factors - 1)
    rest = (steps - known).to(tl.float32)
    factors = factor_ptr + known * 4
    decay = tl.exp2(rest * log2_decay)
    return (
        tl.load(factors) * tl.exp2(rest * log2_beta1),
        tl.load(factors + 1) * tl.exp2(rest * log2_beta2),
        tl.load(factors + 2) * decay,
        tl.load(factors + 3) * decay,
    )


@triton.jit(do_not_specialize=["step"])
def mark_used(last_use_ptr, row_id_ptr, num_rows_ptr, step, BLOCK: tl.constexpr):
    """last_use of the touched rows becomes `step`. A kernel of its own, since several programs may update a row, and
    each must first have read its last use.

    Grid: any number of programs. A program owns every num_programs-th block of BLOCK touched rows. Reads: row_ids.
    Writes: one int32 per touched row.
    """
    num_rows = tl.load(num_rows_ptr)
    for begin in range(tl.program_id(0) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
        i = begin + tl.arange(0, BLOCK)
        row = tl.load(row_id_ptr + i, mask=i < num_rows, other=0)
        tl.store(last_use_ptr + row, tl.zeros([BLOCK], dtype=tl.int32) + step, mask=i < num_rows)


@triton.jit
def updated(param, exp_avg, gradient, rate, decay, beta1):
    """New weights and first moment of a block; rate is the step size divided by AdamW's denominator."""
    exp_avg += (1.0 - beta1) * (gradient - exp_avg)
    return param * decay - rate * exp_avg, exp_avg


@triton.jit
def block_noise(seed, row, i):
    """Two uint32 per element, of which 48 bits round one weight and two moments."""
    key = mix(row.to(tl.uint32) ^ mix(seed.to(tl.uint32)))
    first = mix(i.to(tl.uint32) * 0x9E3779B1 ^ key)
    return first, first * 0x2C1B3C6D ^ (first >> 15)


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_element(
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    order_ptr,
    row_id_ptr,
    run_start_ptr,
    num_rows_ptr,
    weight_ptr,
    vector_ptr,
    grad_scale_ptr,
    last_use_ptr,
    factor_ptr,
    vector_stride,
    decay,
    step_size,
    beta1,
    beta2,
    root_correction,
    eps,
    seed,
    step,
    num_factors,
    log2_beta1,
    log2_beta2,
    log2_decay,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CATCH_UP: tl.constexpr,
):
    """AdamW with one second moment per element, on the touched rows of [N, E, D].

    Grid: any number of programs. A program owns every num_programs-th block of BLOCK_D numbers of the touched rows.
    With CATCH_UP the steps that a row has missed are made good first. Reads: the block of weights and both moments, its
    pairs' places, weights and vectors, the row's last use. Writes: the block of weights and both moments.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    units = tl.load(num_rows_ptr).to(tl.int64) * (E * blocks)
    grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
    for unit in range(tl.program_id(0).to(tl.int64), units, tl.num_programs(0)):
        d = unit % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        e = unit // blocks % E
        run = unit // (blocks * E)
        inside = d < D
        row = tl.load(row_id_ptr + run)
        place = (row.to(tl.int64) * E + e) * D + d
        param = tl.load(param_ptr + place, mask=inside, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptr + place, mask=inside, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0).to(tl.float32)
        first, last = tl.load(run_start_ptr + run), tl.load(run_start_ptr + run + 1)
        gradient = grad_scale * gradient_block(
            order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D, BLOCK_P, BLOCK_D
        )
        if CATCH_UP:
            beta1_n, beta2_n, decay_n, moved = missed_factors(
                last_use_ptr, factor_ptr, num_factors, step, log2_beta1, log2_beta2, log2_decay, row
            )
            rate = step_size / (tl.sqrt(exp_avg_sq) / root_correction + eps)
            param = param * decay_n - rate * moved * exp_avg
            exp_avg *= beta1_n
            exp_avg_sq *= beta2_n
        exp_avg_sq = exp_avg_sq * beta2 + (1.0 - beta2) * gradient * gradient
        rate = step_size / (tl.sqrt(exp_avg_sq) / root_correction + eps)
        param, exp_avg = updated(param, exp_avg, gradient, rate, decay, beta1)
        noise, more_noise = block_noise(seed, row, e * D + d)
        tl.store(param_ptr + place, narrow(param, noise, param_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_ptr + place, narrow(exp_avg, noise >> 16, exp_avg_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq_ptr + place, narrow(exp_avg_sq, more_noise, exp_avg_sq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_row(
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    order_ptr,
    row_id_ptr,
    run_start_ptr,
    num_rows_ptr,
    weight_ptr,
    vector_ptr,
    grad_scale_ptr,
    last_use_ptr,
    factor_ptr,
    vector_stride,
    decay,
    step_size,
    beta1,
    beta2,
    root_correction,
    eps,
    seed,
    step,
    num_factors,
    log2_beta1,
    log2_beta2,
    log2_decay,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CATCH_UP: tl.constexpr,
):
    """AdamW with one second moment per row, the mean square of its gradient, on the touched rows of [N, E, D].

    Grid: any number of programs. A program owns every num_programs-th touched row, all E * D numbers of it. The
    gradient of a row of one block is made once; of a row of several blocks twice, first for the mean square. With
    CATCH_UP the steps that a row has missed are made good first. Reads: weights and first moment of the row, one second
    moment, the factors, the row's last use. Writes: weights and moments.
    """
    blocks: tl.constexpr = E * ((D + BLOCK_D - 1) // BLOCK_D)
    num_rows = tl.load(num_rows_ptr).to(tl.int64)
    grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
    for run in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        row = tl.load(row_id_ptr + run)
        first, last = tl.load(run_start_ptr + run), tl.load(run_start_ptr + run + 1)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + row)
        gradient = tl.zeros([BLOCK_D], dtype=tl.float32)
        square = 0.0
        for block in range(blocks):
            e = block % E
            d = block // E * BLOCK_D + tl.arange(0, BLOCK_D)
            gradient = grad_scale * gradient_block(
                order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D, BLOCK_P, BLOCK_D
            )
            square += tl.sum(gradient * gradient, axis=0)
        if CATCH_UP:
            beta1_n, beta2_n, decay_n, moved = missed_factors(
                last_use_ptr, factor_ptr, num_factors, step, log2_beta1, log2_beta2, log2_decay, row
            )
            moved *= step_size / (tl.sqrt(exp_avg_sq) / root_correction + eps)
            exp_avg_sq *= beta2_n
        exp_avg_sq = exp_avg_sq * beta2 + (1.0 - beta2) * (square / (E * D))
        tl.store(exp_avg_sq_ptr + row, exp_avg_sq)
        rate = step_size / (tl.sqrt(exp_avg_sq) / root_correction + eps)
        for block in range(blocks):
            e = block % E
            d = block // E * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = d < D
            place = (row.to(tl.int64) * E + e) * D + d
            param = tl.load(param_ptr + place, mask=inside, other=0.0).to(tl.float32)
            exp_avg = tl.load(exp_avg_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if blocks > 1:
                gradient = grad_scale * gradient_block(
                    order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D, BLOCK_P, BLOCK_D
                )
            if CATCH_UP:
                param = param * decay_n - moved * exp_avg
                exp_avg *= beta1_n
            param, exp_avg = updated(param, exp_avg, gradient, rate, decay, beta1)
            noise, _ = block_noise(seed, row, e * D + d)
            tl.store(param_ptr + place, narrow(param, noise, param_ptr.dtype.element_ty), mask=inside)
            tl.store(exp_avg_ptr + place, narrow(exp_avg, noise >> 16, exp_avg_ptr.dtype.element_ty), mask=inside)
