"""Expert parallelism for PEER tables: every process of a group holds a part of the experts, and tokens come to all parts.

With heads x k experts a token (128 in the paper's setting) nearly every process holds some of them, so tokens are not
dispatched pair by pair. The group all-gathers tokens, indices and gates, each process sums the experts it has, and a
reduce-scatter adds the parts: 2 x tokens x dim elements whatever k is. Parts are added in float32 and rounded once, as where one
process has all experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ParallelStyle

from titan_peer.distributed.collectives import all_gather, sum_and_scatter
from titan_peer.model import Experts
from titan_peer.ops.peer_experts import backward_op, forward_op
from titan_peer.ops.reference import accumulation_dtype


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
        all_indices = all_gather(indices.int(), self.group).long()  # [group x T, K]
        is_here = (all_indices >= self.first) & (all_indices < self.last)
        here = torch.where(is_here, all_indices - self.first, -1)
        return _SummedOverGroup.apply(  # type: ignore[no-any-return]
            x, here, gates, *self.tables(), self.activation, self.rowwise, self.group
        )

    def tables(self) -> tuple[Tensor, Tensor]:
        """What this process computes with: [last - first, E, D] each."""
        if self.compute_copies is not None:
            return self.compute_copies
        assert isinstance(self.expert_down, DTensor) and isinstance(self.expert_up, DTensor)
        return self.expert_down.to_local(), self.expert_up.to_local()


class _SummedOverGroup(torch.autograd.Function):
    """`peer_experts` of all processes' tokens with the experts that are here, summed over the group: its outputs and, in the
    backward pass, the gradients of its inputs.

    One function, because autograd would round a part of dx to the dtype of x before the parts are added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        here: Tensor,
        gates: Tensor,
        down: Tensor,
        up: Tensor,
        activation: str,
        rowwise: bool,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """x [T, D], here [group x T, K], gates [T, K] -> [T, D]."""
        all_x, all_gates = all_gather(x.detach(), group), all_gather(gates.detach(), group)
        wide = accumulation_dtype(x.dtype)
        part, z = forward_op(all_x, here, all_gates, down, up, activation, rowwise, wide)
        ctx.save_for_backward(all_x, here, all_gates, z, down, up)
        ctx.activation, ctx.rowwise, ctx.group = activation, rowwise, group
        return sum_and_scatter(part, group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        all_x, here, all_gates, z, down, up = ctx.saved_tensors
        all_dy, wide = all_gather(dy, ctx.group), accumulation_dtype(dy.dtype)
        parts = backward_op(all_dy, all_x, here, all_gates, z, down, up, ctx.activation, ctx.rowwise, wide)
        dx, dgates = sum_and_scatter(parts[0], ctx.group).to(dy.dtype), sum_and_scatter(parts[1], ctx.group)
        tables = (None, None) if ctx.rowwise else parts[2:]
        return dx, None, dgates, *tables, None, None, None
