"""All optimizers of a model behind one step, one clipping and one schedule.

Parameters with dense gradients have the optimizer that `optimizer.name` chooses (builders.py). Expert tables have
either that one too, or a `RowwiseOptimizer` (rowwise.py), which reads their gradients as factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.device_mesh import DeviceMesh

from titan_peer.config.optimizer import Optimizer as OptimizerConfig
from titan_peer.distributed.collectives import local, sum_over_processes
from titan_peer.distributed.float8 import refresh_scales
from titan_peer.distributed.parallelize import forget_gathered
from titan_peer.distributed.row_exchange import exchange_row_gradients, factor_bytes, factors_move_fewer_bytes
from titan_peer.model import PEER, Transformer, experts_of
from titan_peer.ops import TABLES, RowGradients
from titan_peer.optim import rowwise
from titan_peer.optim.builders import build_optimizers
from titan_peer.optim.clipping import clip_, total_norm
from titan_peer.optim.groups import parameter_groups
from titan_peer.optim.weight_average import WeightAverage

TableUpdate = Literal["rowwise", "dense", "dense_from_factors"]
"""How the expert tables get from the backward pass to their update.

rowwise: gradients stay factors, which the row-wise optimizer reads.
dense: autograd makes gradients of the tables' size, which processes with the same experts sum.
dense_from_factors: the update is the same, but processes exchange factors, where these are fewer bytes than the tables,
and make them dense after that.
"""


class Optimizers:
    """The optimizers of a model.

    Args:
        expert_mesh: (expert_replica, ep) of several processes; those with the same experts exchange gradients.
        tokens_per_step: tokens of all micro-batches of one process; decides what processes exchange for a dense update.
    """

    def __init__(
        self,
        model: Transformer,
        config: OptimizerConfig,
        expert_mesh: DeviceMesh | None = None,
        tokens_per_step: int = 0,
    ) -> None:
        self.config, self.model, self.expert_mesh = config, model, expert_mesh
        self.experts = experts_of(model)
        self.table_update = self._choose_table_update(tokens_per_step)
        groups = parameter_groups(model, config, with_tables=self.table_update != "rowwise")
        self.dense = build_optimizers(groups, config)
        """Of all parameters with dense gradients, each group in one of them."""
        self.rowwise: rowwise.RowwiseOptimizer | None = None
        self.collectors: list[RowGradients] = []
        """Where the factored gradients of the current step are, unless the table update is "dense"."""
        if self.table_update == "rowwise":
            self.rowwise = rowwise.build(self.experts, config)
            self.collectors = self.rowwise.collectors
        elif self.table_update == "dense_from_factors":
            self.collectors = rowwise.collect_row_gradients(self.experts)
        self.average: WeightAverage | None = None
        """Of the weights, after `average_weights`."""

    def average_weights(self, decay: float) -> None:
        """Keep an exponential moving average of the weights from now on; 0: none."""
        tables = self.rowwise.param_groups[0]["params"] if self.rowwise is not None else []
        self.average = WeightAverage(self.model, decay, tables) if decay else None

    def _choose_table_update(self, tokens_per_step: int) -> TableUpdate:
        if self.experts and self.config.expert_update == "rowwise":
            return "rowwise"
        if self.experts and self._replicas > 1 and self._factors_are_smaller(tokens_per_step):
            return "dense_from_factors"
        return "dense"

    @property
    def _replicas(self) -> int:
        """Processes with the same experts as this one, itself included."""
        return self.expert_mesh.size(0) if self.expert_mesh is not None else 1

    @property
    def _parts(self) -> int:
        """Processes that hold the experts together."""
        return self.expert_mesh.size(1) if self.expert_mesh is not None else 1

    def _factors_are_smaller(self, tokens_per_step: int) -> bool:
        """Whether the dense update should exchange factors; decided before the first backward pass."""
        rows, expert_hidden_size, dim = local(self.experts[0].expert_down).shape
        peers = [module for module in self.model.modules() if isinstance(module, PEER)]
        tokens = tokens_per_step * self._parts * len(peers) // len(self.experts)
        factors = factor_bytes(tokens, peers[0].num_heads * peers[0].num_experts_per_tok, expert_hidden_size, dim)
        return factors_move_fewer_bytes(factors, 2 * 4 * rows * expert_hidden_size * dim, self._replicas)

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        """Those of dense gradients, and the row-wise one if there is one."""
        return [*self.dense, *([self.rowwise] if self.rowwise is not None else [])]

    # ---- a step

    def set_learning_rate(self, lr: float, done: float = 0.0) -> None:
        """The rate of every group, from that of the schedule and the share of the job's steps that are done."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr * self.config.group(group["name"]).lr_factor_at(done)

    def exchange_expert_gradients(self) -> None:
        """Sum the tables' gradients over processes with the same experts. Call once per step, before clipping."""
        if self.expert_mesh is None or self._replicas == 1:
            return
        group = self.expert_mesh.get_group("expert_replica")
        if self.table_update == "dense":
            for table in self._tables_with_gradient():
                sum_over_processes(local(table.grad), group)  # type: ignore[arg-type]
        else:
            exchange_row_gradients(self.collectors, group, compact=self._parts > 1)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, 0-d float32. Call once per step, after the exchange; waits for no device."""
        if self.table_update == "dense_from_factors":
            self._gradients_from_factors()
        return self._norm(*self._with_gradient())

    def clip_and_step(self, max_norm: float, norm: Tensor | None = None) -> Tensor:
        """Clip the gradient as a whole, dense and row-wise parts together, and update; nothing waits for the device.

        Args:
            max_norm: 0 does not clip.
            norm: what `gradient_norm` has returned; None: it has not been called.
        Returns:
            The gradient's norm before clipping, 0-d float32.
        """
        norm = self.gradient_norm() if norm is None else norm
        scale: Tensor | float = 1.0
        if max_norm > 0:
            dense, tables = self._with_gradient()
            scale = clip_(dense, [table.grad for table in tables if table.grad is not None], max_norm, norm)
        if self.average is not None:
            self.average.before_update(self.rows_in_use())
        for optimizer in self.dense:
            optimizer.step()
        if self.rowwise is not None:
            self.rowwise.step(grad_scale=scale)
        if self.average is not None:
            self.average.after_update()
        self.discard_gradient()
        return norm

    def discard_gradient(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def rows_in_use(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The expert tables that the row-wise optimizer updates in this step, each with the rows, int64 [R]."""
        for module, collector in zip(self.experts, self.collectors) if self.rowwise is not None else ():
            if not collector.is_empty:
                rows = collector.sorted().rows()
                yield from ((table, rows) for table in (module.expert_down, module.expert_up))

    def _gradients_from_factors(self) -> None:
        """The exchanged factors as dense gradients."""
        for module, collector in zip(self.experts, self.collectors):
            for which, table in zip(TABLES, (module.expert_down, module.expert_up)):
                table.grad = torch.zeros_like(table)
                if not collector.is_empty:
                    collector.write_dense(which, local(table.grad))
            collector.clear()

    def _with_gradient(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters with dense gradients: expert tables last, the others first."""
        tables = self._tables_with_gradient()
        of_experts = set(tables)
        return [p for p in self.model.parameters() if p.grad is not None and p not in of_experts], tables

    def _tables_with_gradient(self) -> list[nn.Parameter]:
        return [table for module in self.experts for table in module.parameters() if table.grad is not None]

    def _norm(self, dense: list[nn.Parameter], tables: list[nn.Parameter]) -> Tensor:
        """Norm of all gradients of all processes, 0-d float32 on the tables' device."""
        if not self.experts:
            return total_norm(dense)
        squares = [local(table.grad).float().norm().square() for table in tables if table.grad is not None]
        if self.rowwise is not None:
            squares += [c.norm_squared().float() for c in self.collectors if not c.is_empty]
        in_parts = self.expert_mesh is not None and self._parts > 1
        group = self.expert_mesh.get_group("ep") if self.expert_mesh is not None and in_parts else None
        return total_norm(dense, squares, local(self.experts[0].expert_down).device, group)

    # ---- state

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model's weights are their averages inside, where no step may be made. Called by every process."""
        self._swap_with_averages()
        try:
            yield
        finally:
            self._swap_with_averages()

    def _swap_with_averages(self) -> None:
        assert self.average is not None
        self.average.swap_with_weights()
        forget_gathered(self.model)
        refresh_scales(self.model)
        self.refresh_copies()

    def refresh_copies(self) -> None:
        """Call when something other than a step has written the expert tables, which may have copies."""
        if self.rowwise is not None:
            self.rowwise.refresh_copies()

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """What an optimizer and the average of the weights keep for a parameter, by name."""
        averaged = self.average.state_of(parameter) if self.average is not None else {}
        for optimizer in self.all:
            if parameter in optimizer.state:
                return optimizer.state[parameter] | averaged  # type: ignore[no-any-return]
        return averaged

    def _parameter_names(self) -> dict[Tensor, str]:
        return {p: name.replace(_CHECKPOINT_PREFIX, "") for name, p in self.model.named_parameters()}

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of optimizer state with a name that follows its parameter's, for the checkpoint."""
        names = self._parameter_names()
        for optimizer in self.all:
            for parameter, state in optimizer.state.items():
                for key, tensor in state.items():
                    yield f"{names[parameter]}.{key}", tensor

    def named_last_uses(self) -> dict[str, Tensor]:
        """The expert tables whose rows' last uses are kept, by the name of that state. A checkpoint may lack them."""
        if self.rowwise is None:
            return {}
        names = self._parameter_names()
        return {f"{names[p]}.{rowwise.LAST_USE}": p for p, s in self.rowwise.state.items() if rowwise.LAST_USE in s}

    def count_missed_steps_from_now(self, tables: Iterable[Tensor]) -> None:
        """Call for tables whose state has been loaded without their rows' last uses."""
        for table in tables:
            assert self.rowwise is not None
            self.rowwise.count_missed_steps_from_now(table)
