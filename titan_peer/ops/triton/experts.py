"""Kernels of the expert operator: forward and backward are the same pass with the tables' roles exchanged.

Forward dots x with the chosen rows of expert_down and sums rows of expert_up; backward dots dy with the chosen rows of
expert_up and sums rows of expert_down. Each row is read once per use; nothing of size [T, K, D] exists.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of float32 z and its derivative."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * cdf
        slope = cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(2.0 * 0.7978845608028654 * (z + 0.044715 * z * z * z))  # tanh(u) = 2 sigmoid(2u) - 1
        value = z * s
        slope = s + 2.0 * z * s * (1.0 - s) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
    elif ACTIVATION == "relu":
        value = tl.where(z > 0, z, 0.0)
        slope = tl.where(z > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = tl.sigmoid(z)
        value = z * s
        slope = s * (1.0 + z * (1.0 - s))
    return value, slope


@triton.jit(do_not_specialize=["num_tokens"])
def gather_dot_sum(
    vector_ptr,
    index_ptr,
    gate_ptr,
    z_ptr,
    dotted_ptr,
    summed_ptr,
    out_ptr,
    dz_ptr,
    hidden_ptr,
    dgate_ptr,
    num_tokens,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t] = sum_q w_q * summed[n_q], with w_q made from the dot product of vector[t] and dotted[n_q].

    Grid: (tokens, splits). A program owns CHUNK of a token's K * E places (all of them unless there are few tokens),
    BLOCK at a time, and writes one row of out, [splits, T, O]. Reads: vector[t] (D numbers) and the indices once; for
    each present place one row of each table. Both loads are issued before the dot product waits for its rows, so that 2
    * BLOCK rows are in flight. Writes: forward z [T, K, E] float32; backward dz, hidden and u * act(z) (dgate), each
    [T, K, E] float32. A place with a negative index causes no table traffic, and its z, dz and dgate are 0.
    """
    t = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    o = tl.arange(0, BLOCK_O)
    vector = tl.load(vector_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK, BLOCK_O], dtype=tl.float32)
    for begin in tl.range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, K * E), BLOCK, num_stages=STAGES):
        q = begin + tl.arange(0, BLOCK)
        inside = q < K * E
        place = t * K + q // E
        expert = tl.load(index_ptr + place, mask=inside, other=-1)
        present = expert >= 0
        row = (expert * E + q % E)[:, None]
        dotted = tl.load(dotted_ptr + row * D + d[None, :], mask=present[:, None] & (d < D)[None, :], other=0.0)
        summed = tl.load(summed_ptr + row * O + o[None, :], mask=present[:, None] & (o < O)[None, :], other=0.0)
        gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dot = tl.sum(dotted.to(tl.float32) * vector[None, :], axis=1)
        to = t * K * E + q
        if BACKWARD:
            value, slope = activate(tl.load(z_ptr + to, mask=inside, other=0.0), ACTIVATION)
            weight = gate * dot * slope
            tl.store(dz_ptr + to, weight, mask=inside)
            tl.store(hidden_ptr + to, gate * value, mask=inside)
            tl.store(dgate_ptr + to, dot * value, mask=inside)
        else:
            value, _ = activate(dot, ACTIVATION)
            weight = gate * value
            tl.store(z_ptr + to, dot, mask=inside)
        total += weight[:, None] * summed.to(tl.float32)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + (split * num_tokens + t) * O + o, out.to(out_ptr.dtype.element_ty), mask=o < O)
