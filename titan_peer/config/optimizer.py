"""What a job says of its optimizer and learning rate: the sections [optimizer] and [lr_scheduler]."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

from titan_peer.common.bounds import Range, Section

OPTIMIZERS = {
    "adamw": "titan_peer.optim.adamw",
    "muon": "titan_peer.optim.muon",
}
"""What optimizer.name may be, and the module whose `build` creates it (titan_peer/optim/builders.py says how). The
modules are named here, not imported, so that a job can be checked without PyTorch."""

_ROWWISE_ONLY = (
    "expert_optimizer",
    "expert_momentum",
    "expert_catch_up",
    "expert_moment_dtype",
    "expert_compute_dtype",
    "expert_second_moment",
)

GroupName = Literal["matrices", "embeddings", "head", "gains", "sub_keys", "expert_tables"]


@dataclass
class ParameterGroup:
    """What a group of parameters has of its own; -1 takes the value of [optimizer]."""

    lr_factor: Annotated[float, Range(0)] = 1.0
    """Learning rate of the group, as a factor of optimizer.lr."""
    end_lr_factor: Annotated[float, Range(0, also=(-1,))] = -1.0
    """The factor at the end of the job, to which it moves in a straight line over the steps; -1: lr_factor throughout."""
    beta1: Annotated[float, Range(0, 1, below=True, also=(-1,))] = -1.0
    """Decay of the first moment."""
    beta2: Annotated[float, Range(0, 1, below=True, also=(-1,))] = -1.0
    """Decay of the second moment."""
    weight_decay: Annotated[float, Range(0, also=(-1,))] = -1.0
    """Decoupled weight decay."""

    def lr_factor_at(self, done: float) -> float:
        """The factor when `done`, from 0 to 1, of the job's steps are done."""
        end = self.lr_factor if self.end_lr_factor == -1 else self.end_lr_factor
        return self.lr_factor + (end - self.lr_factor) * done


@dataclass
class Muon:
    """How matrices are updated with optimizer.name = "muon"."""

    momentum: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay of the momentum (Nesterov's)."""
    iterations: Annotated[int, Range(1, 8)] = 5
    """Iterations of the polynomials that make a matrix orthogonal (Polar Express, arXiv 2505.16932)."""
    split: bool = True
    """Orthogonalise the parts of a fused projection on their own: each head of queries, keys, values and output, and
    latents apart from the rope key; false takes each weight as one matrix."""
    normalize_rows: bool = False
    """Divide each row of the orthogonal matrix by the root of its running mean square (NorMuon, arXiv 2510.05491);
    optimizer.beta2 is its decay."""
    cautious_weight_decay: bool = False
    """Decay only weights that the update makes smaller too (arXiv 2510.12402)."""


@dataclass
class Optimizer(Section, name="optimizer"):
    """One optimizer for parameters with dense gradients, and a row-wise AdamW for expert tables."""

    name: str = "adamw"
    """adamw: of all parameters, except expert tables with the rowwise update; muon: of the matrices of the blocks, with
    adamw for the other parameters. titan_peer/config/optimizer.py has the names."""
    lr: Annotated[float, Range(0)] = 1e-3
    """Peak learning rate. The update of each optimizer has the size that AdamW's has, so that one rate serves all."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Range(0, above=True)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Decoupled weight decay; gains and expert tables have none unless their group says otherwise."""
    muon: Muon = field(default_factory=Muon)
    """Muon."""
    matrices: ParameterGroup = field(default_factory=ParameterGroup)
    """Weights of the linear layers of the blocks."""
    embeddings: ParameterGroup = field(default_factory=ParameterGroup)
    """Token embeddings, and the head if it is tied to them."""
    head: ParameterGroup = field(default_factory=ParameterGroup)
    """The output head, if it is not tied."""
    gains: ParameterGroup = field(default_factory=lambda: ParameterGroup(weight_decay=0.0))
    """Gains and biases of norms, and whatever else is not a matrix."""
    sub_keys: ParameterGroup = field(default_factory=ParameterGroup)
    """Sub-keys of PEER."""
    expert_tables: ParameterGroup = field(default_factory=lambda: ParameterGroup(weight_decay=0.0))
    """Expert tables of PEER."""
    expert_lr_factor: Annotated[float, Range(0, also=(-1,))] = -1.0
    """The earlier name of optimizer.expert_tables.lr_factor; -1: what that says."""
    expert_weight_decay: Annotated[float, Range(0, also=(-1,))] = -1.0
    """The earlier name of optimizer.expert_tables.weight_decay; -1: what that says."""
    expert_update: Literal["rowwise", "dense"] = "rowwise"
    """rowwise: optimizer.expert_optimizer on only the rows of the experts that a step used; dense: the optimizer
    optimizer.name on whole tables."""
    expert_optimizer: Literal["adamw", "normalized"] = "adamw"
    """Of expert tables with the rowwise update. normalized: the momentum of each expert is orthogonalised, as Muon does with
    whole matrices, so that every update has one size, about AdamW's; one state or none instead of two."""
    expert_momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay of the momentum under expert_optimizer = "normalized"; 0: none, and no state."""
    expert_catch_up: bool = True
    """Make good, when a row is next used, what the steps that it missed would have done to it under the dense update
    (rowwise only): its moments and weights decay and it moves by the rest of its first moment. false: a missed step
    changes nothing, for good."""
    expert_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the moments or the momentum of expert tables (rowwise only); bfloat16 is written with stochastic
    rounding."""
    expert_compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the tables that forward and backward read (rowwise only). bfloat16: copies with half the bytes per row,
    in addition to the float32 tables that the optimizer updates and checkpoints hold."""
    expert_second_moment: Literal["element", "row"] = "element"
    """element: one second moment per weight; row: one per row of an expert table (rowwise only)."""
    table_gradient: Literal["sorted", "atomic", "fastest"] = "sorted"
    """How GPU kernels sum dense gradients of expert tables and sub-keys. sorted: each row once, in one order,
    repeatable; atomic: in the order in which pairs finish; fastest: the faster one as measured by `titan-peer tune`,
    else sorted."""

    def group(self, name: GroupName) -> ParameterGroup:
        """The settings of a group, each with its own value."""
        own: ParameterGroup = getattr(self, name)
        lr_factor, weight_decay = own.lr_factor, own.weight_decay
        if name == "expert_tables" and self.expert_lr_factor != -1:
            lr_factor = self.expert_lr_factor
        if name == "expert_tables" and self.expert_weight_decay != -1:
            weight_decay = self.expert_weight_decay
        return ParameterGroup(
            lr_factor,
            own.end_lr_factor,
            self.beta1 if own.beta1 == -1 else own.beta1,
            self.beta2 if own.beta2 == -1 else own.beta2,
            self.weight_decay if weight_decay == -1 else weight_decay,
        )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.name not in OPTIMIZERS:
            found += self.problem("name", f"must be one of {', '.join(OPTIMIZERS)}")
        found += self._problems_of_earlier_names()
        if self.name == "muon" and self.matrices.beta1 != -1:
            found.append(
                f'optimizer.matrices.beta1 = {self.matrices.beta1}: with optimizer.name = "muon" the decay of the '
                "momentum is optimizer.muon.momentum"
            )
        if self.name != "muon" and self.muon != Muon():
            found.append('optimizer.muon: needs optimizer.name = "muon"')
        if self.expert_update == "dense":
            found += self._needs("expert_update", "rowwise", _ROWWISE_ONLY, "dense")
        elif self.expert_optimizer == "normalized":
            found += self._needs("expert_optimizer", "adamw", ("expert_second_moment",), "normalized")
        else:
            found += self._needs("expert_optimizer", "normalized", ("expert_momentum",), "adamw")
        if self.expert_update == "rowwise" and self.expert_catch_up:
            found += self._catch_up_problems()
        return found

    def _needs(self, key: str, value: str, only_there: tuple[str, ...], here: str) -> list[str]:
        """Of keys that have a meaning only if `key` is `value`, those that are set although it is `here`."""
        found = []
        for name in only_there:
            default = getattr(type(self), name)
            if getattr(self, name) != default:
                allowed = f'needs optimizer.{key} = "{value}"; {here} allows only {json.dumps(default)}'
                found += self.problem(name, allowed)
        return found

    def _catch_up_problems(self) -> list[str]:
        """What makes the closed form of missed steps (ops/missed_steps.py) impossible."""
        found, tables = [], self.group("expert_tables")
        if self.expert_optimizer == "adamw" and tables.beta1**2 > 0.9998 * tables.beta2:
            found.append(
                f"optimizer.beta1 = {tables.beta1} and beta2 = {tables.beta2} of expert tables: beta1 must be below the "
                "root of beta2, or a row that is not used would move for ever; or set optimizer.expert_catch_up = false"
            )
        lr = self.lr * max(tables.lr_factor, tables.lr_factor_at(1.0))
        if lr * tables.weight_decay >= 1:
            found.append(
                f"optimizer.expert_tables.weight_decay = {tables.weight_decay}: times its learning rate, up to {lr:g}, it "
                "must be below 1, or a step leaves nothing of a weight"
            )
        return found

    def _problems_of_earlier_names(self) -> list[str]:
        found = []
        untouched = type(self)().expert_tables
        for earlier, key in (("expert_lr_factor", "lr_factor"), ("expert_weight_decay", "weight_decay")):
            new = getattr(self.expert_tables, key)
            if getattr(self, earlier) != -1 and new != getattr(untouched, key):
                found += self.problem(
                    earlier, f"is the earlier name of optimizer.expert_tables.{key} = {new}: give one"
                )
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
