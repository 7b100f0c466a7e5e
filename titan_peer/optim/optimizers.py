"""Parameter groups, optimizers, gradient clipping and the learning-rate schedule.

Two optimizers share one schedule: torch's fused AdamW for everything that has a dense gradient, and `RowwiseAdamW` for
expert tables whose gradients are kept as factors of the rows a step used (`optimizer.expert_update = "rowwise"`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_peer.config.job import Optimizer as OptimizerConfig
from titan_peer.distributed.row_exchange import exchange_row_gradients, factor_bytes, factors_move_fewer_bytes
from titan_peer.model import PEER, Experts
from titan_peer.ops import RowGradients, rowwise_adamw_
from titan_peer.ops.sorted_pairs import SortedPairs


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, which is the tensor itself where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def collect_row_gradients(experts: list[Experts]) -> list[RowGradients]:
    """Have the tables' gradients recorded as factors; the collectors live as long as the returned list."""
    for module in experts:
        module.rowwise = True
    return [RowGradients(*(local(table) for table in module.tables())) for module in experts]


class RowwiseAdamW(torch.optim.Optimizer):
    """AdamW on the rows of expert tables that a step used; the rows of other experts are neither read nor written.

    For a touched row it is AdamW (arXiv 1711.05101) with the bias correction of the step count of the whole table. An
    untouched row keeps its weights and moments as they are: its moments do not decay and it gets no weight decay.

    Args:
        experts: modules whose tables are updated; their `rowwise` is switched on and a gradient collector is registered.
        moment_dtype: storage of the moments; bfloat16 is written with stochastic rounding.
        second_moment: "element", or "row" for one number a table row (the mean square of its gradient).
        compute_dtype: of the tables that forward and backward read; other than float32 makes copies, of which a step
            writes the rows that it has updated.
    """

    def __init__(
        self,
        experts: list[Experts],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moment_dtype: torch.dtype = torch.float32,
        second_moment: str = "element",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        tables = [table for module in experts for table in (module.expert_down, module.expert_up)]
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.experts = experts
        for module in experts if compute_dtype != torch.float32 else []:
            down, up = local(module.expert_down), local(module.expert_up)
            module.compute_copies = (down.to(compute_dtype), up.to(compute_dtype))
        self.collectors = collect_row_gradients(experts)
        for table in tables:
            self.state[table] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(table, dtype=moment_dtype),
                "exp_avg_sq": (
                    torch.zeros_like(table, dtype=moment_dtype)
                    if second_moment == "element"
                    else torch.zeros_like(table[:, 0, 0].detach(), dtype=torch.float32)
                ),
            }

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scale: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """Apply the recorded gradients, times `grad_scale`, and forget them."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        tables = iter(group["params"])
        for collector in self.collectors:
            down, up = next(tables), next(tables)
            which: Literal["down", "up"]
            for which, table in (("down", down), ("up", up)):
                state = self.state[table]
                state["step"] += 1
                step = int(state["step"])
                if collector.is_empty:
                    continue
                pairs, weights, vectors = collector.table_factors(which)
                rowwise_adamw_(
                    local(table),
                    local(state["exp_avg"]),
                    local(state["exp_avg_sq"]),
                    pairs,
                    weights,
                    vectors,
                    grad_scale=grad_scale,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    bias_correction1=1 - beta1**step,
                    bias_correction2=1 - beta2**step,
                    seed=step,
                )
                self._update_copy(table, pairs)
            collector.clear()

    def _update_copy(self, table: Tensor, pairs: SortedPairs) -> None:
        """Write the updated rows of a table into its copy."""
        copy = self._copies().get(table)
        if copy is None:
            return
        rows = pairs.row_ids[: int(pairs.num_rows)].long()
        for part in rows.split(1 << 14):
            copy.index_copy_(0, part, local(table).index_select(0, part).to(copy.dtype))

    def _copies(self) -> dict[Tensor, Tensor]:
        copies: dict[Tensor, Tensor] = {}
        for module in self.experts:
            if module.compute_copies is not None:
                copies.update(zip((module.expert_down, module.expert_up), module.compute_copies))
        return copies

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Make the copies anew, after something else than `step` has written the tables."""
        for table, copy in self._copies().items():
            copy.copy_(local(table))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for collector in self.collectors:
            collector.clear()


def _parameter_groups(model: nn.Module, config: OptimizerConfig, tables: set[Tensor]) -> list[dict[str, Any]]:
    decayed, plain, dense_tables = [], [], []
    gains = _gains(model)
    for parameter in model.parameters():
        if parameter in tables:
            dense_tables.append(parameter)
        elif parameter.ndim >= 2 and parameter not in gains:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_factor": 1.0},
    ]
    if config.expert_update == "dense":
        expert_group = {"weight_decay": config.expert_weight_decay, "lr_factor": config.expert_lr_factor}
        groups.append({"params": dense_tables, **expert_group})
    return [group for group in groups if group["params"]]


def _gains(model: nn.Module) -> set[Tensor]:
    """Gains and biases of norms, whatever their shape."""
    norms = (m for m in model.modules() if "norm" in type(m).__name__.lower())
    return {parameter for norm in norms for parameter in norm.parameters()}


class Optimizers:
    """All optimizers of a model behind one step, one clipping and one schedule.

    Args:
        expert_mesh: (expert_replica, ep), where there are several processes: those with equal experts exchange gradients.
        tokens_per_step: of one process, all micro-batches; decides what processes exchange for a dense update.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        expert_mesh: DeviceMesh | None = None,
        tokens_per_step: int = 0,
    ) -> None:
        self.config, self.model, self.expert_mesh = config, model, expert_mesh
        self.experts = [module for module in model.modules() if isinstance(module, Experts)]
        tables: set[Tensor] = {table for module in self.experts for table in module.parameters()}
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW(
            _parameter_groups(model, config, tables), lr=config.lr, betas=betas, eps=config.eps, fused=True
        )
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                # made now, not at the first step, so that a checkpoint can be loaded into them
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        self.rowwise: RowwiseAdamW | None = None
        self.collectors: list[RowGradients] = []
        """Where the factored gradients of the current step are: of the row-wise update, or on their way to a dense one."""
        if self.experts and config.expert_update == "rowwise":
            self.rowwise = RowwiseAdamW(
                self.experts,
                lr=config.lr * config.expert_lr_factor,
                betas=betas,
                eps=config.eps,
                weight_decay=config.expert_weight_decay,
                moment_dtype=getattr(torch, config.expert_moment_dtype),
                second_moment=config.expert_second_moment,
                compute_dtype=getattr(torch, config.expert_compute_dtype),
            )
            self.collectors = self.rowwise.collectors
        elif self.experts and self._replicas > 1 and self._factors_are_smaller(tokens_per_step):
            self.collectors = collect_row_gradients(self.experts)

    @property
    def _replicas(self) -> int:
        """Processes with the same experts as this one, itself included."""
        return self.expert_mesh.size(0) if self.expert_mesh is not None else 1

    @property
    def _parts(self) -> int:
        """Processes that hold the experts together."""
        return self.expert_mesh.size(1) if self.expert_mesh is not None else 1

    def _factors_are_smaller(self, tokens_per_step: int) -> bool:
        """Whether the dense update should get its gradients as factors: known before the first backward pass."""
        rows, expert_hidden_size, dim = local(self.experts[0].expert_down).shape
        peers = [module for module in self.model.modules() if isinstance(module, PEER)]
        tokens = tokens_per_step * self._parts * len(peers) // len(self.experts)
        factors = factor_bytes(tokens, peers[0].num_heads * peers[0].num_experts_per_tok, expert_hidden_size, dim)
        return factors_move_fewer_bytes(factors, 2 * 4 * rows * expert_hidden_size * dim, self._replicas)

    def exchange_expert_gradients(self) -> None:
        """Sum the tables' gradients over the processes that hold the same experts. Call once a step, before clipping."""
        if self.expert_mesh is None:
            return
        group = self.expert_mesh.get_group("expert_replica")
        if self.collectors and self._replicas > 1:
            exchange_row_gradients(self.collectors, group, compact=self._parts > 1)
        elif not self.collectors and self._replicas > 1:
            for module in self.experts:
                for table in module.parameters():
                    if table.grad is not None:
                        dist.all_reduce(local(table.grad), group=group)

    def _gradients_from_factors(self) -> None:
        """For the dense update: the exchanged factors as dense gradients."""
        for module, collector in zip(self.experts, self.collectors):
            for which, table in (("down", module.expert_down), ("up", module.expert_up)):
                table.grad = torch.zeros_like(table)
                if not collector.is_empty:
                    collector.write_dense(which, local(table.grad))  # type: ignore[arg-type]
            collector.clear()

    def refresh_copies(self) -> None:
        """Call when something else than a step has written the expert tables: they may have copies to compute with."""
        if self.rowwise is not None:
            self.rowwise.refresh_copies()

    def set_learning_rate(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if self.rowwise is not None:
            self.rowwise.param_groups[0]["lr"] = lr * self.config.expert_lr_factor

    def clip_and_step(self, max_norm: float, row_scale: float = 1.0) -> Tensor:
        """Clip the gradient as a whole, dense and row-wise parts together, and update; nothing waits for the device.

        Args:
            max_norm: 0 does not clip.
            row_scale: what gradients of expert tables, which are sums over processes, are multiplied with to be on the
                scale of the others, which are means.
        Returns:
            The gradient's norm before clipping, 0-d float32.
        """
        if self.rowwise is None:
            if self.collectors:
                self._gradients_from_factors()
            for table in self._tables_with_gradient() if row_scale != 1.0 else ():
                local(table.grad).mul_(row_scale)  # type: ignore[arg-type]
        tables = self._tables_with_gradient()
        of_experts = set(tables)
        dense = [p for p in self.model.parameters() if p.grad is not None and p not in of_experts]
        norm = self._total_norm(dense, tables, row_scale)
        row_clip: Tensor | float = row_scale
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(dense, max_norm, norm, foreach=True)
            clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for table in tables:
                local(table.grad).mul_(clip)  # type: ignore[arg-type]
            row_clip = clip * row_scale
        self.adamw.step()
        if self.rowwise is not None:
            self.rowwise.step(grad_scale=row_clip)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def _tables_with_gradient(self) -> list[nn.Parameter]:
        return [table for module in self.experts for table in module.parameters() if table.grad is not None]

    def _total_norm(self, dense: list[nn.Parameter], tables: list[nn.Parameter], row_scale: float) -> Tensor:
        """Norm of all gradients of all processes, 0-d float32 on the tables' device."""
        dense_norm = torch.nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None], foreach=True)
        if isinstance(dense_norm, DTensor):
            dense_norm = dense_norm.full_tensor()
        device = local(self.experts[0].expert_down).device if self.experts else dense_norm.device
        square = dense_norm.float().square().to(device)
        squares = [local(table.grad).float().norm().square() for table in tables if table.grad is not None]
        if self.rowwise is not None:
            squares += [c.norm_squared().float() * row_scale**2 for c in self.collectors if not c.is_empty]
        if self.experts:
            of_tables = torch.stack([torch.zeros((), device=device), *squares]).sum()
            if self._parts > 1 and self.expert_mesh is not None:
                dist.all_reduce(of_tables, group=self.expert_mesh.get_group("ep"))
            square = square + of_tables
        return square.sqrt()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of optimizer state with a name that follows its parameter's, for the checkpoint."""
        names: dict[Tensor, str] = {
            p: name.replace(_CHECKPOINT_PREFIX, "") for name, p in self.model.named_parameters()
        }
        for optimizer in (self.adamw, self.rowwise):
            if optimizer is None:
                continue
            for parameter, state in optimizer.state.items():
                for key, tensor in state.items():
                    yield f"{names[parameter]}.{key}", tensor
