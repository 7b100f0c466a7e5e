"""Expert parallelism for PEER tables: every process of a group holds a part of the experts, and tokens come to all parts.

With heads x k experts a token (128 in the paper's setting) nearly every process holds some of them, so tokens are not
dispatched pair by pair. The group all-gathers tokens, indices and gates, each process sums the experts it has, and a
reduce-scatter adds the parts: 2 x tokens x dim elements whatever k is.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ParallelStyle

from titan_peer.collectives import all_gather, reduce_scatter
from titan_peer.model import Experts
from titan_peer.ops import peer_experts


class ExpertParallel(ParallelStyle):
    """The plan for one `Experts` module: tables sharded on the expert axis, `Shard(0)`, over a one-dimensional mesh.

    Works on the meta device, so that no process ever has the whole table. The module becomes a `ShardedExperts`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        for name, table in list(module.named_parameters(recurse=False)):
            shape, offset = compute_local_shape_and_global_offset(table.shape, device_mesh, [Shard(0)])
            part = table.detach().narrow(0, offset[0], shape[0]).clone()
            sharded = DTensor.from_local(
                part, device_mesh, [Shard(0)], run_check=False, shape=table.shape, stride=table.stride()
            )
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=table.requires_grad))
        # A change of class, not of the instance's forward: equal blocks stay equal for the compiler, which then has one
        # compilation for all.
        module.__class__ = ShardedExperts
        assert isinstance(module, ShardedExperts)
        module.group = device_mesh.get_group()
        module.first, module.last = offset[0], offset[0] + shape[0]
        return module


class ShardedExperts(Experts):
    """Experts of which this process has those from `first` to `last` - 1; its group has all."""

    group: dist.ProcessGroup
    first: int
    last: int

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """x [T, D], indices and gates [T, K] of this process' tokens -> [T, D]."""
        all_x = all_gather(x, self.group)  # [group x T, D]
        all_gates = all_gather(gates, self.group)  # [group x T, K]
        all_indices = all_gather(indices.int(), self.group).long()
        is_here = (all_indices >= self.first) & (all_indices < self.last)
        here = torch.where(is_here, all_indices - self.first, -1)
        y = peer_experts(all_x, here, all_gates, *self.tables(), self.activation, rowwise=self.rowwise)
        return reduce_scatter(y, self.group)

    def tables(self) -> tuple[Tensor, Tensor]:
        """What this process computes with: [last - first, E, D] each."""
        if self.compute_copies is not None:
            return self.compute_copies
        assert isinstance(self.expert_down, DTensor) and isinstance(self.expert_up, DTensor)
        return self.expert_down.to_local(), self.expert_up.to_local()
