"""Expert parallelism for PEER tables: every process of a group holds a part of the experts and sees all tokens.

With heads x k experts per token (128 in the paper's setting) nearly every process holds some of them, so tokens are not
dispatched pair by pair. The group all-gathers tokens, indices and gates, each process sums the outputs of its experts,
and a reduce-scatter adds these parts: 2 x tokens x dim elements, whatever k is. Parts are added in float32 and rounded
once, as in a process that has all experts.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from titan_peer.ops import RowGradients
from titan_peer.ops.peer_experts import backward_op, forward_op
from titan_peer.ops.reference import accumulation_dtype


class ExpertParallel(ParallelStyle):
    """The plan for one `Experts` module: tables sharded on the expert axis, `Shard(0)`, over a one-dimensional mesh.

    Works on the meta device, so that no process ever holds the whole table. The module computes with
    `ExpertsOverGroup`.
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
        module.plan.operator = ExpertsOverGroup(device_mesh.get_group(), offset[0], offset[0] + shape[0])
        return module


@dataclass(frozen=True)
class ExpertsOverGroup:
    """`peer_experts` where this process has the experts from `first` to `last` - 1, and its group has all."""

    group: dist.ProcessGroup
    first: int
    last: int

    def __call__(
        self,
        x: Tensor,
        indices: Tensor,
        gates: Tensor,
        expert_down: Tensor,
        expert_up: Tensor,
        activation: str,
        row_gradients: RowGradients | None,
    ) -> Tensor:
        """x [T, D], indices and gates [T, K] of this process' tokens, tables [last - first, E, D] -> [T, D]."""
        all_indices = all_gather(indices.int(), self.group).long()  # [group x T, K]
        is_here = (all_indices >= self.first) & (all_indices < self.last)
        here = torch.where(is_here, all_indices - self.first, -1)
        handle = None if row_gradients is None else row_gradients.handle
        return _SummedOverGroup.apply(  # type: ignore[no-any-return]
            x, here, gates, _part(expert_down), _part(expert_up), activation, handle, self.group
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsOverGroup:
        return self  # a group of processes has no copies


def _part(table: Tensor) -> Tensor:
    """The experts of this process, with a gradient; copies of lower precision hold only these anyway."""
    return table.to_local() if isinstance(table, DTensor) else table


class _SummedOverGroup(torch.autograd.Function):
    """`peer_experts` on the tokens of all processes with the experts of this one, summed over the group: the outputs
    and, in the backward pass, the gradients of the inputs.

    It is one function because autograd would round each part of dx to the dtype of x before the parts are added.
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
        handle: Tensor | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """x [T, D], here [group x T, K], gates [T, K] -> [T, D]."""
        all_x, all_gates = all_gather(x.detach(), group), all_gather(gates.detach(), group)
        wide = accumulation_dtype(x.dtype)
        part, z = forward_op(all_x, here, all_gates, down, up, activation, handle, wide)
        ctx.save_for_backward(all_x, here, all_gates, z, down, up, handle)
        ctx.activation, ctx.group = activation, group
        return sum_and_scatter(part, group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        all_x, here, all_gates, z, down, up, handle = ctx.saved_tensors
        all_dy, wide = all_gather(dy, ctx.group), accumulation_dtype(dy.dtype)
        parts = backward_op(all_dy, all_x, here, all_gates, z, down, up, ctx.activation, handle, wide)
        dx, dgates = sum_and_scatter(parts[0], ctx.group).to(dy.dtype), sum_and_scatter(parts[1], ctx.group)
        tables = (None, None) if handle is not None else parts[2:]
        return dx, None, dgates, *tables, None, None, None
