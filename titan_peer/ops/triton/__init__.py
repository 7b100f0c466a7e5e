"""The Triton backend: the functions of `reference`, computed by GPU kernels.

Nothing here makes the host wait for the device: the number of touched rows stays on the device, and tensors whose
length depends on it have the largest possible length. With TRITON_INTERPRET=1 the same kernels run on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from titan_peer.ops.triton import experts, tuning
from titan_peer.ops.triton.retrieval import retrieve_backward, retrieve_forward
from titan_peer.ops.triton.table_gradients import (
    dense_gradients,
    row_norm_squared,
    sort_pairs,
    table_gradient,
)
from titan_peer.ops.triton.updates import rowwise_adamw_, rowwise_normalized_

__all__ = [
    "dense_gradients",
    "description",
    "peer_backward",
    "peer_forward",
    "retrieve_backward",
    "retrieve_forward",
    "row_norm_squared",
    "rowwise_adamw_",
    "rowwise_normalized_",
    "sort_pairs",
    "table_gradient",
    "unavailable_reason",
]

_power_of_2 = triton.next_power_of_2


def unavailable_reason(device_type: str) -> str | None:
    """Why the kernels cannot run on a kind of device, or None if they can."""
    if tuning.INTERPRETED:
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 is set: kernels run on CPU tensors only"
    if device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device_type} (TRITON_INTERPRET=1 runs them there, slowly)"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"compute capability {capability}: Triton kernels need 8.0 or more"


def description() -> str:
    """One line: what runs, and whether its launches were tuned."""
    if tuning.INTERPRETED:
        return f"Triton {triton.__version__} kernels, interpreted (for tests; very slow)"
    tuned = tuning.is_tuned(torch.device("cuda", torch.cuda.current_device()))
    return f"Triton {triton.__version__} kernels, launched {'as tuned' if tuned else 'by rule'}"


# ---- experts


def peer_forward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    z = torch.empty(*indices.shape, down.shape[1], dtype=torch.float32, device=x.device)
    return _gather_dot_sum("experts_forward", x, indices, gates, z, down, up, activation, None, sum_dtype), z


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
    dz, hidden, dgates = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z)
    sum_dtype, outputs = sum_dtype or x.dtype, (dz, hidden, dgates)
    dx = _gather_dot_sum("experts_backward", dy, indices, gates, z, up, down, activation, outputs, sum_dtype)
    summed = dgates.squeeze(-1) if z.shape[2] == 1 else dgates.sum(-1)
    return dx, summed.to(gates.dtype), dz, hidden


def _gather_dot_sum(
    kernel: str,
    vectors: Tensor,
    indices: Tensor,
    gates: Tensor,
    z: Tensor,
    dotted: Tensor,
    summed: Tensor,
    activation: str,
    outputs: tuple[Tensor, Tensor, Tensor] | None,
    sum_dtype: torch.dtype | None,
) -> Tensor:
    """The sums [T, O], in `sum_dtype` (None: the vectors')."""
    sum_dtype = sum_dtype or vectors.dtype
    (T, K), (_, E, D), O = indices.shape, dotted.shape, summed.shape[2]
    launch = tuning.launch_for(tuning.problem(kernel, dotted, K, E, D), vectors.device)
    places = K * E
    splits = tuning.num_splits(vectors.device, T, triton.cdiv(places, launch.block)) if places else 1
    chunk = triton.cdiv(triton.cdiv(places, launch.block), splits) * launch.block
    out = torch.empty(splits, T, O, dtype=sum_dtype if splits == 1 else torch.float32, device=vectors.device)
    if T == 0:
        return out[0].to(sum_dtype)
    with torch.cuda.device_of(vectors):
        experts.gather_dot_sum[(T, splits)](
            vectors.contiguous(),
            indices.contiguous(),
            gates.contiguous(),
            z,
            dotted.contiguous(),
            summed.contiguous(),
            out,
            *(outputs or (z, z, z)),
            T,
            K=K,
            E=E,
            D=D,
            O=O,
            ACTIVATION=activation,
            BACKWARD=outputs is not None,
            CHUNK=max(chunk, 1),
            BLOCK=launch.block,
            BLOCK_D=_power_of_2(D),
            BLOCK_O=_power_of_2(O),
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
    return out[0] if splits == 1 else out.sum(0).to(sum_dtype)
