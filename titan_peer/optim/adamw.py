"""AdamW (arXiv 1711.05101) for parameters with dense gradients: PyTorch's fused implementation."""

from __future__ import annotations

from typing import Any

import torch

from titan_peer.config.optimizer import Optimizer as OptimizerConfig


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return [adamw]
