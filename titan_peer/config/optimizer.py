"""What a job says of its optimizer and learning rate: the sections [optimizer] and [lr_scheduler]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from titan_peer.common.bounds import Range, Section

OPTIMIZERS = {
    "adamw": "titan_peer.optim.adamw",
}
"""What optimizer.name may be, and the module whose `build` creates it (titan_peer/optim/builders.py says how). The
modules are named here, not imported, so that a job can be checked without PyTorch."""


@dataclass
class Optimizer(Section, name="optimizer"):
    """One optimizer for parameters with dense gradients, and a row-wise AdamW for expert tables."""

    name: str = "adamw"
    """Optimizer of all parameters except expert tables with the rowwise update; titan_peer/config/optimizer.py has the
    names."""
    lr: Annotated[float, Range(0)] = 1e-3
    """Peak learning rate."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Range(0, above=True)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Decoupled weight decay of matrices; norms, gains and biases have none."""
    expert_lr_factor: Annotated[float, Range(0)] = 1.0
    """Learning rate of expert tables, as a factor of lr."""
    expert_weight_decay: Annotated[float, Range(0)] = 0.0
    """Decoupled weight decay of expert tables."""
    expert_update: Literal["rowwise", "dense"] = "rowwise"
    """rowwise: AdamW on only the rows of the experts that a step used (the moments of others do not decay meanwhile);
    dense: the optimizer optimizer.name on whole tables."""
    expert_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the moments of expert tables (rowwise only); bfloat16 is written with stochastic rounding."""
    expert_compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the tables that forward and backward read (rowwise only). bfloat16: copies with half the bytes per row,
    in addition to the float32 tables that the optimizer updates and checkpoints hold."""
    expert_second_moment: Literal["element", "row"] = "element"
    """element: one second moment per weight; row: one per row of an expert table (rowwise only)."""
    table_gradient: Literal["sorted", "atomic", "fastest"] = "sorted"
    """How GPU kernels sum dense gradients of expert tables and sub-keys. sorted: each row once, in one order,
    repeatable; atomic: in the order in which pairs finish; fastest: the faster one as measured by `titan-peer tune`,
    else sorted."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.name not in OPTIMIZERS:
            found += self.problem("name", f"must be one of {', '.join(OPTIMIZERS)}")
        if self.expert_update == "dense":
            for key in ("expert_moment_dtype", "expert_compute_dtype", "expert_second_moment"):
                default = getattr(type(self), key)
                if getattr(self, key) != default:
                    allowed = f'needs optimizer.expert_update = "rowwise"; dense allows only "{default}"'
                    found += self.problem(key, allowed)
        return found


@dataclass
class LRScheduler(Section, name="lr_scheduler"):
    """Warmup, stable, decay."""

    warmup_steps: Annotated[int, Range(0)] = 100
    """Steps of linear warmup from 0 to lr."""
    decay_ratio: Annotated[float, Range(0, 1)] = 0.2
    """Share of training.steps, at the end, over which the rate decays; between warm-up and decay it is constant."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Annotated[float, Range(0, 1)] = 0.0
    """Rate at the last step, as a factor of lr."""
