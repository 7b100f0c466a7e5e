"""The norm of all gradients of all processes, and clipping to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_peer.distributed.collectives import local, sum_over_processes


def total_norm(
    dense: Sequence[nn.Parameter],
    table_squares: Sequence[Tensor] = (),
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The norm of all gradients of all processes before clipping, 0-d float32.

    Args:
        dense: parameters that FSDP shards, or that each process holds whole.
        table_squares: squared norms of this process' part of the expert tables' gradients, 0-d float32 each.
        device: of the tables, which need not be that of the other parameters; the result is there.
        group: the processes that hold the tables together, each a part; None: each process holds them whole.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None], foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    device = device or norm.device
    of_tables = torch.stack([torch.zeros((), device=device), *table_squares]).sum()
    if group is not None:
        sum_over_processes(of_tables, group)
    return (norm.float().square().to(device) + of_tables).sqrt()


def clip_(dense: Sequence[nn.Parameter], tables: Sequence[Tensor], max_norm: float, norm: Tensor) -> Tensor:
    """Scale gradients in place so that their norm, `norm` before, is at most `max_norm`.

    Args:
        tables: the dense gradients of expert tables.
    Returns:
        The scale, 0-d, for gradients that are not here.
    """
    torch.nn.utils.clip_grads_with_norm_(dense, max_norm, norm, foreach=True)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in tables:
        local(gradient).mul_(scale)
    return scale
