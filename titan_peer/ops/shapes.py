"""The backend for fake tensors, on which a dry run trains: it makes results of the right shapes and allocates the
memory that computing them takes. It holds only what runs outside of custom ops; these have their own shape rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_peer.ops.sorted_pairs import SortedPairs


def sort_pairs(indices: Tensor, num_experts: int) -> SortedPairs:
    """Assumes that every place is present and that as many different experts as possible are chosen."""
    P = indices.numel()
    R = min(P, num_experts)
    torch.empty(4, P, dtype=torch.int32, device=indices.device)  # scratch of the sort
    order, row_ids, run_starts = (torch.empty(n, dtype=torch.int32, device=indices.device) for n in (P, R, R + 1))
    return SortedPairs(order, row_ids, run_starts, torch.tensor(R, device=indices.device))


def table_gradient(pairs: SortedPairs, weights: Tensor, vectors: Tensor, out: Tensor, **_: Any) -> None:
    vectors.float()


def row_norm_squared(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Tensor:
    vectors.float()
    return torch.zeros((), device=vectors.device)


def rowwise_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    **_: Any,
) -> None:
    vectors.float()


def rowwise_normalized_(
    param: Tensor, momentum: Tensor | None, pairs: SortedPairs, weights: Tensor, vectors: Tensor, **_: Any
) -> None:
    vectors.float()
