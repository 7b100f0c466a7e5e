"""Which parameters get weight decay, and which learning rate: the parameter groups of the dense optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from titan_peer.config.optimizer import Optimizer as OptimizerConfig
from titan_peer.model import QueryBatchNorm

NORMS = (nn.RMSNorm, nn.LayerNorm, QueryBatchNorm)
"""Their gains and biases get no weight decay, whatever their shape."""


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, tables: set[nn.Parameter], *, with_tables: bool
) -> list[dict[str, Any]]:
    """Matrices, which decay; other parameters, which do not; and expert tables, which have their own settings.

    Args:
        tables: the parameters that are expert tables.
        with_tables: tables have dense gradients and get a group; otherwise they are left out.
    Returns:
        The groups that have parameters. Each has its `weight_decay`, and the `lr_factor` by which its learning rate
        differs from the scheduled one.
    """
    gains = {p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    decayed, plain, dense_tables = [], [], []
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
    if with_tables:
        expert_group = {"weight_decay": config.expert_weight_decay, "lr_factor": config.expert_lr_factor}
        groups.append({"params": dense_tables, **expert_group})
    return [group for group in groups if group["params"]]
