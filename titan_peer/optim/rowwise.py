"""Optimizers of only those rows of expert tables that a step used, with gradients that are kept as factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_peer.config.optimizer import Optimizer as OptimizerConfig
from titan_peer.distributed.collectives import local
from titan_peer.model import Experts
from titan_peer.ops import TABLES, MissedSteps, RowGradients, rowwise_adamw_, rowwise_normalized_
from titan_peer.ops.sorted_pairs import SortedPairs

LAST_USE = "last_use"
"""Name of the state that holds the step of each row's last use."""


def collect_row_gradients(experts: list[Experts]) -> list[RowGradients]:
    """Record the tables' gradients as factors from now on, in the returned collectors."""
    collectors = [RowGradients(*(local(table) for table in module.tables())) for module in experts]
    for module, collector in zip(experts, collectors):
        module.plan.row_gradients = collector
    return collectors


class RowwiseOptimizer(torch.optim.Optimizer):
    """Updates the rows of expert tables that a step used; it neither reads nor writes the rows of other experts.

    With `catch_up` the steps that a row has missed since its last use are made good when it is next updated
    (ops/missed_steps.py). Without, a missed step changes neither weights nor state, for good.

    A subclass adds its state of each table to `state` and says in `_update` what happens to a table.

    Args:
        experts: modules whose tables are updated; their gradients go to the optimizer's collectors from now on.
        defaults: of the parameter group; `lr` and `weight_decay` among them.
        catch_up: keep the step of each row's last use, and make good the steps that it missed.
        compute_dtype: dtype of the tables that forward and backward read. Any other than float32 creates copies, in
            which a step writes the rows that it has updated.
    """

    def __init__(
        self, experts: list[Experts], defaults: dict[str, Any], *, catch_up: bool, compute_dtype: torch.dtype
    ) -> None:
        tables = [table for module in experts for table in (module.expert_down, module.expert_up)]
        super().__init__([{"name": "expert_tables", "params": tables}], defaults)
        self.experts, self.catch_up = experts, catch_up
        for module in experts if compute_dtype != torch.float32 else []:
            down, up = local(module.expert_down), local(module.expert_up)
            module.plan.compute_copies = (down.to(compute_dtype), up.to(compute_dtype))
            module.register_load_state_dict_post_hook(_refresh_copies)
        self.collectors = collect_row_gradients(experts)
        for table in tables:
            self.state[table] = {"step": torch.tensor(0.0)}
            if catch_up:
                self.state[table][LAST_USE] = torch.zeros_like(table[:, 0, 0].detach(), dtype=torch.int32)

    def _update(
        self,
        table: Tensor,
        state: dict[str, Tensor],
        step: int,
        factors: tuple[SortedPairs, Tensor, Tensor],
        grad_scale: Tensor | float,
    ) -> None:
        """Update the rows of a table [N, E, D] (this process' part of it) that have `factors` (RowGradients.table_factors)."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scale: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """Apply the recorded gradients, times `grad_scale`, and clear them.

        Raises:
            RuntimeError: the model's tables or collectors are no longer those of this optimizer.
        """
        self._require_own_tables()
        for module, collector in zip(self.experts, self.collectors):
            for which, (table, copy) in zip(TABLES, _tables_and_copies(module)):
                state = self.state[table]
                state["step"] += 1
                if collector.is_empty:
                    continue
                factors = collector.table_factors(which)
                self._update(local(table), state, int(state["step"]), factors, grad_scale)
                if copy is not None:
                    _copy_rows(local(table), copy, factors[0])
            collector.clear()

    def _missed(self, state: dict[str, Tensor], step: int, beta1: float, beta2: float) -> MissedSteps | None:
        if not self.catch_up:
            return None
        group = self.param_groups[0]
        return MissedSteps(local(state[LAST_USE]), step, beta1, beta2, 1 - group["lr"] * group["weight_decay"])

    def count_missed_steps_from_now(self, table: Tensor) -> None:
        """Take all rows of a table as up to date: what a state that was saved without their last uses allows."""
        state = self.state[table]
        local(state[LAST_USE]).fill_(int(state["step"]))

    def _require_own_tables(self) -> None:
        tables = iter(self.param_groups[0]["params"])
        for module, collector in zip(self.experts, self.collectors):
            same_tables = module.expert_down is next(tables) and module.expert_up is next(tables)
            if not same_tables or module.plan.row_gradients is not collector:
                raise RuntimeError(
                    "The row-wise optimizer: the expert tables, or what collects their gradients, are no longer those that this "
                    "optimizer was made with, so its step would not change the model. Usual causes: "
                    "load_state_dict(..., assign=True), which puts other parameters into the model, or a second "
                    "optimizer for the same model. Make the optimizer after these, or load without assign=True"
                )

    def refresh_copies(self) -> None:
        """Recreate the copies after something other than `step` or `load_state_dict` has written the tables."""
        for module in self.experts:
            _refresh_copies(module)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for collector in self.collectors:
            collector.clear()


class RowwiseAdamW(RowwiseOptimizer):
    """AdamW (arXiv 1711.05101) on the rows in use, with bias correction by the step count of the whole table.

    Args:
        moment_dtype: dtype in which moments are stored; bfloat16 is written with stochastic rounding.
        second_moment: "element", or "row" for one number per table row (the mean square of its gradient).
    """

    def __init__(
        self,
        experts: list[Experts],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        catch_up: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        second_moment: str = "element",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(experts, defaults, catch_up=catch_up, compute_dtype=compute_dtype)
        for table, state in self.state.items():
            state["exp_avg"] = torch.zeros_like(table, dtype=moment_dtype)
            state["exp_avg_sq"] = (
                torch.zeros_like(table, dtype=moment_dtype)
                if second_moment == "element"
                else torch.zeros_like(table[:, 0, 0].detach(), dtype=torch.float32)
            )

    def _update(
        self,
        table: Tensor,
        state: dict[str, Tensor],
        step: int,
        factors: tuple[SortedPairs, Tensor, Tensor],
        grad_scale: Tensor | float,
    ) -> None:
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        rowwise_adamw_(
            table,
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            *factors,
            grad_scale=grad_scale,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction1=1 - beta1**step,
            bias_correction2=1 - beta2**step,
            seed=step,
            missed=self._missed(state, step, beta1, beta2),
        )


class RowwiseNormalized(RowwiseOptimizer):
    """Orthogonalised momentum (Muon) on the rows in use: each expert's block [E, D] is a matrix of its own.

    Args:
        momentum: decay of the momentum per step; 0: the gradient alone is normalized, and there is no state for it.
        moment_dtype: dtype in which the momentum is stored; bfloat16 is written with stochastic rounding.
        catch_up: as for every row-wise optimizer; a missed step decays momentum and weights, but moves nothing.
    """

    def __init__(
        self,
        experts: list[Experts],
        *,
        lr: float,
        momentum: float,
        eps: float,
        weight_decay: float,
        catch_up: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        catch_up = catch_up and (momentum > 0 or weight_decay > 0)  # otherwise a missed step has changed nothing
        super().__init__(experts, defaults, catch_up=catch_up, compute_dtype=compute_dtype)
        for table, state in self.state.items() if momentum > 0 else ():
            state["momentum"] = torch.zeros_like(table, dtype=moment_dtype)

    def _update(
        self,
        table: Tensor,
        state: dict[str, Tensor],
        step: int,
        factors: tuple[SortedPairs, Tensor, Tensor],
        grad_scale: Tensor | float,
    ) -> None:
        group = self.param_groups[0]
        rowwise_normalized_(
            table,
            local(state["momentum"]) if "momentum" in state else None,
            *factors,
            grad_scale=grad_scale,
            lr=group["lr"],
            beta=group["momentum"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            seed=step,
            missed=self._missed(state, step, group["momentum"], 1.0),
        )


def build(experts: list[Experts], config: OptimizerConfig) -> RowwiseOptimizer:
    """The row-wise optimizer of a job's expert tables."""
    own = config.group("expert_tables")
    of_all: dict[str, Any] = {
        "lr": config.lr * own.lr_factor,
        "eps": config.eps,
        "weight_decay": own.weight_decay,
        "catch_up": config.expert_catch_up,
        "moment_dtype": getattr(torch, config.expert_moment_dtype),
        "compute_dtype": getattr(torch, config.expert_compute_dtype),
    }
    if config.expert_optimizer == "normalized":
        return RowwiseNormalized(experts, momentum=config.expert_momentum, **of_all)
    betas, second_moment = (own.beta1, own.beta2), config.expert_second_moment
    return RowwiseAdamW(experts, betas=betas, second_moment=second_moment, **of_all)


def _tables_and_copies(module: Experts) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Both tables, in the order of TABLES, each with the copy that is computed with instead."""
    return list(zip((module.expert_down, module.expert_up), module.plan.compute_copies or (None, None)))


def _copy_rows(table: Tensor, copy: Tensor, pairs: SortedPairs) -> None:
    """Write the updated rows of a table into its copy."""
    for part in pairs.rows().split(1 << 14):
        copy.index_copy_(0, part, table.index_select(0, part).to(copy.dtype))


@torch.no_grad()
def _refresh_copies(module: Experts, _loaded: Any = None) -> None:
    """Also a hook of `load_state_dict`. Not a closure, so that the module can be pickled."""
    for table, copy in _tables_and_copies(module):
        if copy is not None:
            copy.copy_(local(table))
