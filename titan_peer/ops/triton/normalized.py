"""Kernel of the row-wise update by orthogonalised momentum: each touched expert's block is read once, brought up to
date, updated with its gradient from factors, and written."""

from __future__ import annotations

import triton
import triton.language as tl

from titan_peer.ops.triton.adamw import block_noise, missed_factors, narrow


@triton.jit
def gradient_tile(
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
):
    """float32 [BLOCK_E, BLOCK_D]: sum over the pairs first..last-1 of weight[pair, e] * vector[pair // K, d], always in
    the same order."""
    total = tl.zeros([e.shape[0], d.shape[0]], dtype=tl.float32)
    for i in range(first, last):
        pair = tl.load(order_ptr + i).to(tl.int64)
        weight = tl.load(weight_ptr + pair * E + e, mask=e < E, other=0.0).to(tl.float32)
        vector = tl.load(vector_ptr + pair // K * vector_stride + d, mask=d < D, other=0.0).to(tl.float32)
        total += weight[:, None] * vector[None, :]
    return total


@triton.jit
def direction_tile(gradient, momentum_ptr, place, inside, beta, beta_n, MOMENTUM: tl.constexpr):
    """The new momentum of a tile and what is normalized: the momentum that an equal gradient would lead to next
    (Nesterov), or, without momentum, the gradient."""
    if MOMENTUM:
        old = tl.load(momentum_ptr + place, mask=inside, other=0.0).to(tl.float32) * beta_n
        momentum = old + (1.0 - beta) * (gradient - old)
        return momentum, momentum + (1.0 - beta) * (gradient - momentum)
    else:
        return gradient, gradient


@triton.jit
def inverse_root(a, unit, ITERATIONS: tl.constexpr):
    """A^(-1/2) of a symmetric positive definite [BLOCK_E, BLOCK_E], as `reference.inverse_root`; rows beyond E are
    zero."""
    trace = tl.sum(tl.sum(a * unit, axis=1), axis=0)
    y, z = a / trace, unit
    for _ in range(ITERATIONS):
        t = 1.5 * unit - 0.5 * tl.dot(z, y, input_precision="ieee")
        y = tl.dot(y, t, input_precision="ieee")
        z = tl.dot(t, z, input_precision="ieee")
    return z / tl.sqrt(trace)


@triton.jit(do_not_specialize=["seed", "step"])
def normalized(
    param_ptr,
    momentum_ptr,
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
    beta,
    floor,
    damping,
    seed,
    step,
    num_factors,
    log2_beta1,
    log2_beta2,
    log2_decay,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITERATIONS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CATCH_UP: tl.constexpr,
):
    """Orthogonalised momentum on the touched experts' blocks of [N, E, D].

    Grid: any number of programs. A program owns every num_programs-th touched row, all E x D numbers of it. What is
    normalized is made once for a row of one tile, for a row of several tiles twice, first for A. Reads: weights and
    momentum of the row, its last use, the factors. Writes: weights and momentum.
    """
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    num_rows = tl.load(num_rows_ptr).to(tl.int64)
    grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
    e = tl.arange(0, BLOCK_E)
    unit = tl.where((e[:, None] == e[None, :]) & (e < E)[:, None], 1.0, 0.0)
    for run in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        row = tl.load(row_id_ptr + run)
        first, last = tl.load(run_start_ptr + run), tl.load(run_start_ptr + run + 1)
        beta_n, decay_n = 1.0, decay
        if CATCH_UP:
            factors = missed_factors(
                last_use_ptr, factor_ptr, num_factors, step, log2_beta1, log2_beta2, log2_decay, row
            )
            beta_n, decay_n = factors[0], factors[2] * decay
        u = tl.zeros([BLOCK_E, BLOCK_D], dtype=tl.float32)
        momentum = u
        a = tl.zeros([BLOCK_E, BLOCK_E], dtype=tl.float32)
        for tile in range(tiles):
            d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = (e < E)[:, None] & (d < D)[None, :]
            place = (row.to(tl.int64) * E + e)[:, None] * D + d[None, :]
            u = grad_scale * gradient_tile(order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D)
            momentum, u = direction_tile(u, momentum_ptr, place, inside, beta, beta_n, MOMENTUM)
            if E == 1:
                a += tl.sum(u * u, axis=1)[:, None]
            else:
                a += tl.dot(u, tl.trans(u), input_precision="ieee")
        a = a / max(E, D)
        if E == 1:
            root = 1.0 / tl.sqrt(a + floor)
        else:
            trace = tl.sum(tl.sum(a * unit, axis=1), axis=0)
            root = inverse_root(a + unit * (floor + damping * trace / E), unit, ITERATIONS)
        for tile in range(tiles):
            d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = (e < E)[:, None] & (d < D)[None, :]
            place = (row.to(tl.int64) * E + e)[:, None] * D + d[None, :]
            if tiles > 1:
                u = grad_scale * gradient_tile(
                    order_ptr, weight_ptr, vector_ptr, vector_stride, first, last, e, d, K, E, D
                )
                momentum, u = direction_tile(u, momentum_ptr, place, inside, beta, beta_n, MOMENTUM)
            noise = block_noise(seed, row, e[:, None] * D + d[None, :])[0]
            if MOMENTUM:
                rounded = narrow(momentum, noise >> 16, momentum_ptr.dtype.element_ty)
                tl.store(momentum_ptr + place, rounded, mask=inside)
            if E == 1:
                turned = root * u
            else:
                turned = tl.dot(root, u, input_precision="ieee")
            param = tl.load(param_ptr + place, mask=inside, other=0.0).to(tl.float32)
            param = param * decay_n - step_size * turned
            tl.store(param_ptr + place, narrow(param, noise, param_ptr.dtype.element_ty), mask=inside)
