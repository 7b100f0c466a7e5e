"""How processes that hold the same experts sum their row-wise table gradients.

A gradient exists as factors (see `titan_peer.ops.RowGradients`), whose size follows the tokens of a step; it could also
be made dense, whose size follows the experts. The form that moves fewer bytes is exchanged. Afterwards every process
has the same gradient in the same order, so all processes make exactly the same update, to the last bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from titan_peer.distributed.collectives import all_gather_into, max_over_processes, sum_over_processes
from titan_peer.ops import TABLES, RowGradients


def factors_move_fewer_bytes(factor_bytes: int, table_bytes: int, replicas: int) -> bool:
    """Whether all-gathering the factors moves fewer bytes than all-reducing dense gradients.

    Each process receives (replicas - 1) x factor_bytes in an all-gather, and 2 x (replicas - 1) / replicas x
    table_bytes in a ring all-reduce.

    Args:
        factor_bytes: the factors of one process in one optimizer step.
        table_bytes: the dense gradients of the rows that this process holds, both tables.
    """
    return replicas * factor_bytes < 2 * table_bytes


def factor_bytes(num_tokens: int, places: int, expert_hidden_size: int, dim: int, element_size: int = 4) -> int:
    """Bytes of the factors of a pair of tables: int64 indices, float32 dz and hidden, x and dy of `element_size` bytes.

    Args:
        num_tokens: how many tokens went through these tables in the step; each layer that shares them
            counts.
        places: experts per token, heads x k.
    """
    return num_tokens * (places * (8 + 2 * 4 * expert_hidden_size) + 2 * element_size * dim)


def exchange_row_gradients(collectors: list[RowGradients], group: dist.ProcessGroup, *, compact: bool) -> None:
    """Give every process of the group the sum of the row-wise gradients of all.

    Args:
        group: the processes that hold the same experts.
        compact: first drop the places of experts that this process does not have; they are many with expert
            parallelism.
    """
    for collector in collectors:
        if collector.is_empty:
            continue
        # every process has had the same number of tokens, so all have folded them or none has
        dense = collector.take_dense()
        if dense is not None:
            for part in dense[:2]:
                sum_over_processes(part, group)
            max_over_processes(dense[2], group)
            continue
        indices, dz, hidden, x, dy = collector.factors()
        if compact:
            indices, dz, hidden = _compact(indices, dz, hidden, group)
        moved = sum(factor.numel() * factor.element_size() for factor in (indices, dz, hidden, x, dy))
        table_bytes = sum(4 * shape.numel() for shape in collector.shapes)
        if factors_move_fewer_bytes(moved, table_bytes, group.size()):
            collector.replace(*(all_gather_into(factor, group) for factor in (indices, dz, hidden, x, dy)))
        else:
            _all_reduce_dense(collector, group)


def _compact(indices: Tensor, dz: Tensor, hidden: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """[T, K] -> [T, K'], present places first, with the smallest K' that is enough for every token of every process."""
    present = indices >= 0
    most = present.sum(1).max().clamp_min(1)
    max_over_processes(most, group)
    places = (~present).to(torch.int8).argsort(dim=1, stable=True)[:, : int(most)]
    wide = places.unsqueeze(-1).expand(-1, -1, dz.shape[2])
    return indices.gather(1, places), dz.gather(1, wide), hidden.gather(1, wide)


def _all_reduce_dense(collector: RowGradients, group: dist.ProcessGroup) -> None:
    """Sum dense gradients, then turn the rows that any process has used back into factors: a gradient row [E, D]
    becomes E tokens, each with one expert, with weight 1 in one hidden neuron."""
    num_experts, expert_hidden_size, _ = collector.shapes[0]
    indices = collector.factors()[0]
    used = torch.zeros(num_experts + 1, dtype=torch.int32, device=indices.device)
    used[torch.where(indices < 0, num_experts, indices).flatten()] = 1  # the last entry takes the absent places
    sum_over_processes(used, group)
    rows = used[:-1].nonzero().squeeze(1)
    vectors = []
    for which, shape in zip(TABLES, collector.shapes):
        gradient = torch.zeros(shape, dtype=torch.float32, device=indices.device)
        collector.write_dense(which, gradient)
        sum_over_processes(gradient, group)
        vectors.append(gradient[rows].flatten(0, 1))  # [R * E, D]
    weights = torch.eye(expert_hidden_size, device=rows.device).repeat(rows.numel(), 1).unsqueeze(1)  # [R * E, 1, E]
    indices = rows.repeat_interleave(expert_hidden_size).unsqueeze(1)  # [R * E, 1]
    collector.replace(indices, weights, weights, *vectors)
