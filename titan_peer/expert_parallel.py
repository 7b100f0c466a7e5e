"""Expert parallelism for PEER tables: every process of a group holds a part of the experts, and tokens come to all parts.

With heads x k experts a token (128 in the paper's setting) nearly every process holds some of them, so tokens are not
dispatched pair by pair. The group all-gathers tokens, indices and gates, each process sums the experts it has, and a
reduce-scatter adds the parts: 2 x tokens x dim elements whatever k is.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_gather_tensor,
    all_gather_tensor_autograd,
    reduce_scatter_tensor_autograd,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ParallelStyle

from titan_peer.model import Experts
from titan_peer.ops import RowGradients, peer_experts


class ExpertParallel(ParallelStyle):
    """The plan for one `Experts` module: tables sharded on the expert axis, `Shard(0)`, over a one-dimensional mesh.

    Works on the meta device, so that no process ever has the whole table. The module's class is untouched; this instance
    gets another forward.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        num_experts = module.expert_down.shape[0]
        for name, table in list(module.named_parameters(recurse=False)):
            shape, offset = compute_local_shape_and_global_offset(table.shape, device_mesh, [Shard(0)])
            part = table.detach().narrow(0, offset[0] if shape[0] else 0, shape[0]).clone()
            sharded = DTensor.from_local(
                part, device_mesh, [Shard(0)], run_check=False, shape=table.shape, stride=table.stride()
            )
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=table.requires_grad))
        size = -(-num_experts // device_mesh.size())  # experts a process, as DTensor cuts them; the last may have fewer
        first = min(device_mesh.get_local_rank() * size, num_experts)
        last = min(first + size, num_experts)
        module.forward = partial(  # type: ignore[method-assign]
            _forward, module, group=device_mesh.get_group(), first=first, last=last
        )
        return module


def _forward(
    module: Experts, x: Tensor, indices: Tensor, gates: Tensor, *, group: dist.ProcessGroup, first: int, last: int
) -> Tensor:
    """`Experts.forward` over a group, of which this process has the experts first..last-1.

    x [T, D], indices and gates [T, K] of this process' tokens -> [T, D].
    """
    all_x = all_gather_tensor_autograd(x.contiguous(), 0, group)  # [group x T, D]
    all_gates = all_gather_tensor_autograd(gates.contiguous(), 0, group)  # [group x T, K]
    all_indices = all_gather_tensor(indices.int().contiguous(), 0, group).long()
    is_mine = (all_indices >= first) & (all_indices < last)
    mine = torch.where(is_mine, all_indices - first, -1)
    tables = (module.expert_down.to_local(), module.expert_up.to_local())  # type: ignore[operator,attr-defined]
    y = peer_experts(all_x, mine, all_gates, *tables, module.activation, rowwise=module.rowwise)
    return reduce_scatter_tensor_autograd(y, "sum", 0, group)  # type: ignore[no-any-return]


def exchange_row_gradients(collectors: list[RowGradients], group: dist.ProcessGroup, *, compact: bool) -> None:
    """Give the processes that hold the same experts the row-gradient factors of all of them, so that all update alike.

    Args:
        group: those processes.
        compact: first drop the places of experts that are not here, of which an expert-parallel group has many.
    """
    for collector in collectors:
        indices, dz, hidden, x, dy = collector.factors()
        if compact:
            indices, dz, hidden = _compact(indices, dz, hidden, group)
        collector.replace(*(_all_gather(factor, group) for factor in (indices, dz, hidden, x, dy)))


def _compact(indices: Tensor, dz: Tensor, hidden: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """[T, K] -> [T, K'], present places first, with the smallest K' that serves every token of every process."""
    present = indices >= 0
    most = present.sum(1).max().clamp_min(1)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    places = (~present).to(torch.int8).argsort(dim=1, stable=True)[:, : int(most)]
    wide = places.unsqueeze(-1).expand(-1, -1, dz.shape[2])
    return indices.gather(1, places), dz.gather(1, wide), hidden.gather(1, wide)


def _all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def factors_move_fewer_bytes(
    num_tokens: int, num_experts_per_token: int, expert_hidden_size: int, dim: int, table_rows: int
) -> bool:
    """Whether a replica's gradient of both tables is smaller as factors than as dense tables.

    Factors are all-gathered, so each replica receives those of all others: (replicas - 1) x factors. A dense all-reduce
    sends and receives 2 x (replicas - 1) / replicas x tables. Compared for two replicas, where dense reduction is at its
    cheapest beside factors.

    Args:
        num_tokens: recorded by one replica in one optimizer step (its expert-parallel group's, all micro-batches).
        num_experts_per_token: heads x k.
        table_rows: rows of a table that this process holds.
    """
    factors = num_tokens * (num_experts_per_token * (8 + 2 * 4 * expert_hidden_size) + 2 * 4 * dim)
    return factors < 2 * 4 * table_rows * expert_hidden_size * dim
