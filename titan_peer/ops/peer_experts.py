"""The expert operator: each token's chosen experts, applied and summed (arXiv 2407.04153, eq. 1 with expert MLPs).

Two custom ops, forward and backward, so that compilers, activation checkpointing and autocast see one opaque step each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_peer.ops import reference
from titan_peer.ops.backends import backend_for
from titan_peer.ops.checks import require_dtype, require_one_device, require_pairs_fit
from titan_peer.ops.row_gradients import RowGradients

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def peer_experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    expert_down: Tensor,
    expert_up: Tensor,
    activation: str = "gelu",
    row_gradients: RowGradients | None = None,
) -> Tensor:
    """y_t = sum_j gates[t, j] * sum_e act(expert_down[n, e] . x_t) * expert_up[n, e], with n = indices[t, j].

    Args:
        x: [T, D]; float32, bfloat16, float16 (or float64, on the reference path).
        indices: int64 [T, K]; an expert may occur more than once. A negative index marks an absent place: it adds
            nothing, causes no memory traffic, and its gate gets no gradient (another process has that expert).
        gates: [T, K].
        expert_down: [N, E, D]; its dtype may differ from x's (float32 tables with bfloat16 x).
        expert_up: [N, E, D_out].
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        row_gradients: where the backward pass records the factors of the tables' gradients; the tables then get no
            dense ones. The caller keeps it until the backward pass is done.
    Returns:
        [T, D_out], dtype of x; sums are float32.
    Raises:
        ValueError: a shape, a dtype, a device or the activation is invalid.
        IndexError: an index is beyond the tables (CPU only).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if expert_down.shape[:2] != expert_up.shape[:2] or expert_down.shape[2] != x.shape[1]:
        raise ValueError(
            f"expert_down {list(expert_down.shape)} and expert_up {list(expert_up.shape)} must be [N, E, D] and "
            f"[N, E, D_out] with D = {x.shape[1]} of x {list(x.shape)}"
        )
    if indices.shape != gates.shape or indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"indices {list(indices.shape)} and gates {list(gates.shape)} must both be [T, K] with T = {x.shape[0]}"
        )
    require_one_device(x=x, indices=indices, gates=gates, expert_down=expert_down, expert_up=expert_up)
    handle = None if row_gradients is None else row_gradients.handle
    return forward_op(x, indices, gates, expert_down, expert_up, activation, handle, x.dtype)[0]


@torch.library.custom_op("titan_peer::peer_experts", mutates_args=())
def forward_op(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    handle: Tensor | None,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y in `sum_dtype` (float32 if y is one part of a sum), and the pre-activations z.

    `handle` is that of the `RowGradients`; only the backward pass reads it.
    """
    require_dtype("indices", indices, (torch.int64,))
    for name, tensor in (("x", x), ("gates", gates), ("expert_down", down), ("expert_up", up)):
        require_dtype(name, tensor, _FLOATS)
    require_pairs_fit(indices.numel(), down.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        return backend_for(x, down).peer_forward(x, indices, gates, down, up, activation, sum_dtype)


@forward_op.register_fake
def _(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    handle: Tensor | None,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    z = x.new_empty((*indices.shape, down.shape[1]), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape[0], up.shape[2], dtype=sum_dtype), z


@torch.library.custom_op("titan_peer::peer_experts_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    handle: Tensor | None,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (in `sum_dtype`), dgates, d down, d up.

    With a handle the last two are empty and their factors go to its `RowGradients`. No compiler sees this side effect;
    it is safe because the op is opaque and its other results are always needed.
    """
    with torch.autocast(x.device.type, enabled=False):
        backend = backend_for(x, down)
        dx, dgates, dz, hidden = backend.peer_backward(dy, x, indices, gates, z, down, up, activation, sum_dtype)
        if handle is not None:
            RowGradients.of(handle).record(indices, dz, hidden, x, dy)
            return dx, dgates, down.new_empty(0), up.new_empty(0)
        ddown, dup = torch.zeros_like(down), torch.zeros_like(up)
        backend.dense_gradients(indices, [(dz, x, ddown), (hidden, dy, dup)])
        return dx, dgates, ddown, dup


@backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    handle: Tensor | None,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, dtype=sum_dtype)
    if handle is not None:
        # While a compiler traces, the handle is a stand-in without a collector; a dry run's fake handle has one.
        collector = RowGradients.find(handle)
        if collector is not None:
            collector.record(indices, torch.empty_like(z), torch.empty_like(z), x, dy)
        return dx, torch.empty_like(gates), down.new_empty(0), up.new_empty(0)
    return dx, torch.empty_like(gates), torch.empty_like(down), torch.empty_like(up)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, indices, gates, down, up, ctx.activation, handle, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, indices, gates, output[1], down, up, handle)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, gates, z, down, up, handle = ctx.saved_tensors
    factors = (dy.contiguous(), x, indices, gates, z, down, up)
    dx, dgates, ddown, dup = backward_op(*factors, ctx.activation, handle, x.dtype)
    tables = (None, None) if handle is not None else (ddown, dup)
    return dx, None, dgates, *tables, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
