"""Muon for the matrices of the blocks: the update is the momentum, made orthogonal (Jordan et al., 2024).

A matrix [m, n] of momentum has the singular value decomposition U S V^T. Its update is U V^T, in which all directions
count alike, times 0.2 sqrt(max(m, n)): with this factor its elements have the root mean square of AdamW's updates, 0.2
(Moonlight, arXiv 2502.16982, section 2.2), and one learning rate serves both optimizers. U V^T is approached by
polynomials in matrix products alone (Polar Express, arXiv 2505.16932).

Weights that are several matrices in one, such as the heads of MLA's projections, are taken apart first (groups.py).
Matrices of equal shape are stacked and orthogonalised in one batched product. Under FSDP each matrix is gathered to one
process, which makes it orthogonal for all (distributed/matrix_owners.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_peer.config.optimizer import Optimizer as OptimizerConfig
from titan_peer.distributed.collectives import local
from titan_peer.distributed.matrix_owners import on_owners, sum_over_shards
from titan_peer.ops.row_gradients import UPDATE_RMS
from titan_peer.optim import adamw
from titan_peer.optim.groups import Parts

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""(a, b, c) of each iteration p(x) = a x + b x^3 + c x^5 for singular values in [1e-3, 1] (arXiv 2505.16932, section 4.4)."""
SAFETY = 1.01
"""Rounding to bfloat16 may make the largest singular value larger than the norm says; the polynomials are divided by
this (section 4.4), except for the last one, which is exact at 1."""

STACK_ELEMENTS = 1 << 26
"""Matrices are stacked up to this many elements, which bounds the memory of an update."""


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """U V^T of each matrix U S V^T, approximately: singular values of at least 1e-3 of the norm become 1 within a few
    per cent with five iterations or more.

    Args:
        matrices: [..., m, n]; their dtype is that of the products.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    x = x / (norm * SAFETY + 1e-20).to(x.dtype)
    for i, (a, b, c) in enumerate(POLAR_EXPRESS[:iterations]):
        if i < len(POLAR_EXPRESS) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Muon on matrices, which may be DTensors of a mesh (dp_shard) or (dp_replicate, dp_shard), sharded in dim 0.

    Args:
        groups: parameter groups with `params`, [m, n] each, `parts` (what they consist of, in the same order), `betas`
            and `weight_decay`.
        dtype: of the products of `orthogonalize`.
        others: see `OptimizerConfig.muon`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        iterations: int,
        normalize_rows: bool = False,
        cautious_weight_decay: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        shapes = [list(parameter.shape) for group in self.param_groups for parameter in group["params"]]
        if wrong := [shape for shape in shapes if len(shape) != 2]:
            raise ValueError(f"Muon: a parameter of shape {wrong[0]} is no matrix: give it another optimizer")
        self.iterations, self.dtype = iterations, dtype
        self.normalize_rows, self.cautious_weight_decay = normalize_rows, cautious_weight_decay
        for group in self.param_groups:
            for parameter in group["params"]:
                state = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(parameter)}
                if normalize_rows:
                    state["row_mean_square"] = torch.zeros_like(parameter[:, 0].detach())
                self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            indices = [i for i, parameter in enumerate(group["params"]) if parameter.grad is not None]
            params, parts = [group["params"][i] for i in indices], [group["parts"][i] for i in indices]
            if not params:
                continue
            directions = self._momentum(params, group["momentum"])
            updates = on_owners(params, directions, partial(self._orthogonal, parts))
            if self.normalize_rows:
                self._normalize_rows(params, updates, group["betas"][1])
            self._apply(params, updates, group["lr"], group["weight_decay"])

    def _momentum(self, params: list[Tensor], decay: float) -> list[Tensor]:
        """Nesterov's momentum of the local part of each parameter, in `dtype`."""
        gradients = [local(parameter.grad) for parameter in params]  # type: ignore[arg-type]
        momenta = [local(self.state[parameter]["momentum"]) for parameter in params]
        torch._foreach_lerp_(momenta, gradients, 1 - decay)
        return [gradient.lerp(momentum, decay).to(self.dtype) for gradient, momentum in zip(gradients, momenta)]

    def _orthogonal(
        self, parts: Sequence[Parts | None], indices: Sequence[int], directions: list[Tensor]
    ) -> list[Tensor]:
        """The update of each whole matrix at learning rate 1, in the memory of its direction; `indices`: of its
        parts."""
        stacks: dict[tuple[int, int], list[Tensor]] = {}
        for i, direction in zip(indices, directions):
            dim, sizes = parts[i] or (0, (direction.shape[0],))
            for piece in direction.split(sizes, dim=dim):
                stacks.setdefault((piece.shape[0], piece.shape[1]), []).append(piece)
        for (m, n), pieces in stacks.items():
            at_once = max(STACK_ELEMENTS // (m * n), 1)
            for i in range(0, len(pieces), at_once):
                some = pieces[i : i + at_once]
                made = orthogonalize(torch.stack(some), self.iterations) * (UPDATE_RMS * max(m, n) ** 0.5)
                torch._foreach_copy_(some, made.unbind(0))
        return directions

    def _normalize_rows(self, params: list[Tensor], updates: list[Tensor], decay: float) -> None:
        """NorMuon: divide rows by the root of their running mean square, and keep each matrix's norm."""
        squares, wholes = [], []
        for parameter, update in zip(params, updates):
            state = self.state[parameter]
            mean_square = local(state["row_mean_square"])
            wide = update.float()
            mean_square.lerp_(wide.square().mean(1), 1 - decay)
            state["step"] += 1
            corrected = mean_square / (1 - decay ** int(state["step"]))
            normed = wide * torch.rsqrt(corrected + 1e-10)[:, None]
            squares += [wide.square().sum(), normed.square().sum()]
            wholes.append(normed)
        before, after = sum_over_shards(params[0], torch.stack(squares)).view(-1, 2).unbind(1)
        for update, normed, factor in zip(updates, wholes, (before / after.clamp_min(1e-20)).sqrt()):
            update.copy_(normed * factor)

    def _apply(self, params: list[Tensor], updates: list[Tensor], lr: float, weight_decay: float) -> None:
        weights = [local(parameter) for parameter in params]
        if self.cautious_weight_decay and weight_decay:
            for weight, update in zip(weights, updates):
                weight.mul_(1 - lr * weight_decay * (weight * update > 0))
        elif weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        for weight, update in zip(weights, updates):
            weight.add_(update, alpha=-lr)


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the other parameters."""
    matrices = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    if not config.muon.split:
        matrices = [{**group, "parts": [None] * len(group["params"])} for group in matrices]
    settings = config.muon
    muon = Muon(
        matrices,
        lr=config.lr,
        momentum=settings.momentum,
        iterations=settings.iterations,
        normalize_rows=settings.normalize_rows,
        cautious_weight_decay=settings.cautious_weight_decay,
    )
    return [muon, *adamw.build(others, config)]
