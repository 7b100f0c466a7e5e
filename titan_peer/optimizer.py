"""Parameter groups, optimizers, gradient clipping and the learning-rate schedule.

Two optimizers share one schedule: torch's fused AdamW for everything that has a dense gradient, and `RowwiseAdamW` for
expert tables whose gradients are kept as factors of the rows a step used (`optimizer.expert_update = "rowwise"`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor

from titan_peer.config import LRScheduler
from titan_peer.config import Optimizer as OptimizerConfig
from titan_peer.model import Experts
from titan_peer.ops import RowGradients, rowwise_adamw_


def learning_rate_factor(step: int, total_steps: int, config: LRScheduler) -> float:
    """Warmup-stable-decay: the factor on the peak rate for `step` (the first step is 1).

    Linear warmup over `warmup_steps`, then 1, then a decay over the last `decay_ratio * total_steps` steps that reaches
    `min_lr_factor` at the last one: linear, cosine, or sqrt (1 - sqrt of the share done).
    """
    warmup_steps = min(config.warmup_steps, total_steps)
    decay_steps = min(round(config.decay_ratio * total_steps), total_steps - warmup_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - (total_steps - decay_steps)) / decay_steps if decay_steps else 0.0
    if done <= 0:
        return 1.0
    done = min(done, 1.0)
    if config.decay_type == "linear":
        left = 1 - done
    elif config.decay_type == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - math.sqrt(done)
    return config.min_lr_factor + (1 - config.min_lr_factor) * left


class RowwiseAdamW(torch.optim.Optimizer):
    """AdamW on the rows of expert tables that a step used; the rows of other experts are neither read nor written.

    For a touched row it is AdamW (arXiv 1711.05101) with the bias correction of the step count of the whole table. An
    untouched row keeps its weights and moments as they are: its moments do not decay and it gets no weight decay.

    Args:
        experts: modules whose tables are updated; their `rowwise` is switched on and a gradient collector is registered.
        moment_dtype: storage of the moments; bfloat16 is written with stochastic rounding.
        second_moment: "element", or "row" for one number a table row (the mean square of its gradient).
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
    ) -> None:
        tables = [table for module in experts for table in (module.expert_down, module.expert_up)]
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.collectors: list[RowGradients] = []
        for module in experts:
            module.rowwise = True
            self.collectors.append(RowGradients(module.expert_down.data, module.expert_up.data))
        for table in tables:
            row_shape = table.shape if second_moment == "element" else table.shape[:1]
            row_dtype = moment_dtype if second_moment == "element" else torch.float32
            self.state[table] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(table, dtype=moment_dtype),
                "exp_avg_sq": torch.zeros(row_shape, dtype=row_dtype, device=table.device),
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
                    table.data,
                    state["exp_avg"],
                    state["exp_avg_sq"],
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
            collector.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for collector in self.collectors:
            collector.clear()


def _parameter_groups(model: nn.Module, config: OptimizerConfig, tables: set[Tensor]) -> list[dict[str, Any]]:
    decayed, plain, dense_tables = [], [], []
    for parameter in model.parameters():
        if parameter in tables:
            dense_tables.append(parameter)
        elif parameter.ndim >= 2 and parameter not in _gains(model):
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


def _expert_modules(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


class Optimizers:
    """All optimizers of a model behind one step, one clipping and one schedule."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.model = model
        experts = _expert_modules(model)
        tables: set[Tensor] = {table for module in experts for table in module.parameters()}
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
        if experts and config.expert_update == "rowwise":
            self.rowwise = RowwiseAdamW(
                experts,
                lr=config.lr * config.expert_lr_factor,
                betas=betas,
                eps=config.eps,
                weight_decay=config.expert_weight_decay,
                moment_dtype=getattr(torch, config.expert_moment_dtype),
                second_moment=config.expert_second_moment,
            )

    @property
    def collectors(self) -> list[RowGradients]:
        """Where the row-wise gradients of the current step are."""
        return self.rowwise.collectors if self.rowwise is not None else []

    def set_learning_rate(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if self.rowwise is not None:
            self.rowwise.param_groups[0]["lr"] = lr * self.config.expert_lr_factor

    def clip_and_step(self, max_norm: float, row_scale: float = 1.0) -> Tensor:
        """Clip the gradient as a whole, dense and row-wise parts together, and update; nothing waits for the device.

        Args:
            max_norm: 0 does not clip.
            row_scale: what recorded row gradients are multiplied with to be on the scale of the dense ones.
        Returns:
            The gradient's norm before clipping, 0-d float32.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        dense_norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if isinstance(dense_norm, DTensor):
            dense_norm = dense_norm.full_tensor()
        squares = [dense_norm.float().square()]
        squares += [c.norm_squared().float() * row_scale**2 for c in self.collectors if not c.is_empty]
        norm = torch.stack(squares).sum().sqrt()
        row_clip: Tensor | float = row_scale
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm, foreach=True)
            row_clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) * row_scale
        self.adamw.step()
        if self.rowwise is not None:
            self.rowwise.step(grad_scale=row_clip)
        self.adamw.zero_grad(set_to_none=True)
        return norm

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
