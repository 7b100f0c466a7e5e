"""The optimizers that `optimizer.name` chooses.

A new one is a module with a function `build` (a `Builder`), and a line in the table `OPTIMIZERS` in
titan_peer/config/optimizer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from titan_peer.config.optimizer import OPTIMIZERS
from titan_peer.config.optimizer import Optimizer as OptimizerConfig

Builder = Callable[[list[dict[str, Any]], OptimizerConfig], list[torch.optim.Optimizer]]
"""From the parameter groups (groups.py) and the job's settings to optimizers, each of other groups.

They create their state at once rather than at the first step, so that a checkpoint can be loaded into it. State with one
value per element or per row of an expert table follows an expert that is re-initialised.
"""


def build_optimizers(groups: list[dict[str, Any]], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of the parameters with dense gradients."""
    build: Builder = import_module(OPTIMIZERS[config.name]).build
    return build(groups, config)
