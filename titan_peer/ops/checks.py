"""What the kernels rely on but cannot check themselves: dtypes, devices, contiguous memory, numbers that fit int32."""

from __future__ import annotations

import torch
from torch import Tensor

from titan_peer.ops.missed_steps import MissedSteps

MOST_PAIRS = 2**31 - 2**12
"""Pairs are numbered in int32, and kernels step up to one block beyond the last pair."""
MOST_ROWS = 2**31 - 1
_STORED = (torch.float32, torch.bfloat16)


def require_pairs_fit(num_pairs: int, num_rows: int) -> None:
    """
    Raises:
        ValueError: pairs or rows cannot be numbered in int32.
    """
    if num_pairs > MOST_PAIRS:
        raise ValueError(
            f"{num_pairs:,} (token, expert) pairs at once: must be at most {MOST_PAIRS:,}; use smaller micro-batches"
        )
    if num_rows > MOST_ROWS:
        raise ValueError(f"{num_rows:,} experts: must be at most {MOST_ROWS:,}")


def require_one_device(**tensors: Tensor) -> None:
    """
    Raises:
        ValueError: the tensors are not all on one device.
    """
    devices = [tensor.device for tensor in tensors.values()]
    if any(device != devices[0] for device in devices):
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{found}: must be on one device")


def require_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """
    Raises:
        ValueError: the dtype is not among the allowed ones.
    """
    if tensor.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name}: has dtype {str(tensor.dtype).removeprefix('torch.')}, must be {words}")


def require_contiguous(name: str, tensor: Tensor) -> None:
    """
    Raises:
        ValueError: `tensor` is not contiguous, so a kernel that updates it in place would write to wrong addresses.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: has strides {tensor.stride()} for shape {list(tensor.shape)}, must be contiguous")


def require_adamw_state(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """What `rowwise_adamw_` updates: param and moments [N, E, D], or the second moment [N].

    Raises:
        ValueError: a shape, dtype or device does not fit, or memory is not contiguous.
    """
    per_row = exp_avg_sq.ndim == 1
    floats = (torch.float64, torch.float32) if param.dtype == torch.float64 else _STORED
    for name, tensor in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        require_dtype(name, tensor, floats)
        require_contiguous(name, tensor)
    require_one_device(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if exp_avg.shape != param.shape or exp_avg_sq.shape != (param.shape[:1] if per_row else param.shape):
        raise ValueError(
            f"exp_avg {list(exp_avg.shape)} and exp_avg_sq {list(exp_avg_sq.shape)}: must have the shape of param, "
            f"{list(param.shape)}, or exp_avg_sq one number per row"
        )
    if per_row and exp_avg_sq.dtype == torch.bfloat16:
        raise ValueError("exp_avg_sq: one number per row must be float32, not bfloat16")
    if not per_row and exp_avg_sq.dtype != exp_avg.dtype:
        raise ValueError(f"exp_avg_sq: has dtype {exp_avg_sq.dtype}, must be that of exp_avg, {exp_avg.dtype}")


def require_momentum(param: Tensor, momentum: Tensor | None) -> None:
    """What `rowwise_normalized_` updates: param and momentum [N, E, D].

    Raises:
        ValueError: a shape, dtype or device does not fit, or memory is not contiguous.
    """
    floats = (torch.float64, torch.float32) if param.dtype == torch.float64 else _STORED
    for name, tensor in (("param", param), ("momentum", param if momentum is None else momentum)):
        require_dtype(name, tensor, floats)
        require_contiguous(name, tensor)
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}, must be that of param, {list(param.shape)}")
    if momentum is not None:
        require_one_device(param=param, momentum=momentum)


def require_last_use(param: Tensor, missed: MissedSteps | None) -> None:
    """
    Raises:
        ValueError: last_use is not one int32 for each row of param, contiguous and on its device.
    """
    if missed is None:
        return
    require_dtype("last_use", missed.last_use, (torch.int32,))
    require_contiguous("last_use", missed.last_use)
    require_one_device(param=param, last_use=missed.last_use)
    if missed.last_use.shape != param.shape[:1]:
        raise ValueError(f"last_use: has shape {list(missed.last_use.shape)}, must be [{param.shape[0]}], one per row")
