"""A remedy for uneven usage: an auxiliary loss, the KL divergence of a batch's gate-weighted usage from the uniform
one.

It is the unevenness that is reported (arXiv 2407.04153, section 3.3), of the tokens at hand and in differentiable form,
so its gradient lowers the gates of the experts that have too much and raises those of the others that were retrieved;
through the scores it moves queries and sub-keys. Experts that nothing retrieves get no gradient: for those, see
revival.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_peer.model import PEER, Transformer, peer_layers


def unevenness(indices: Tensor, gates: Tensor, num_experts: int) -> Tensor:
    """log N + sum_n p_n log p_n, where p_n are the experts' shares of the gates.

    Work and memory grow with the pairs, not with the experts: gates are summed along the runs of the sorted indices.

    Args:
        indices: int64, any shape; places with a negative index (padding) have no share.
        gates: the same shape; not negative.
    Returns:
        0-d, dtype of gates, nats; differentiable in gates. log N, without a gradient, if all gates are zero.
    """
    experts, order = indices.flatten().sort()
    is_first = torch.cat([experts.new_zeros(1, dtype=torch.bool), experts[1:] != experts[:-1]])
    present = torch.where(indices < 0, 0, gates).flatten()
    sums = torch.zeros_like(present).index_add(0, is_first.cumsum(0), present[order])
    tiny = torch.finfo(sums.dtype).tiny
    total = sums.sum()
    # without any gate above zero there are no shares, and no gradient: dividing by `tiny` alone would make it infinite
    shares = torch.where(total > tiny, sums / total.clamp_min(tiny), 0)
    return math.log(num_experts) + (shares * shares.clamp_min(tiny).log()).sum()


class _AddLoss(torch.autograd.Function):
    """Returns the gates unchanged; the backward pass adds the gradient of `loss` to that of the model's own loss."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, loss: Tensor) -> Tensor:
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_ones(())


@dataclass(eq=False)
class _BalanceLoss:
    """The hook that adds the loss of one layer."""

    num_experts: int
    weight: float

    def __call__(self, peer: PEER, indices: Tensor, gates: Tensor) -> Tensor | None:
        if not peer.training:
            return None
        loss = self.weight * unevenness(indices, gates, self.num_experts)
        return _AddLoss.apply(gates, loss)  # type: ignore[no-any-return]


def add_balance_loss(model: Transformer, coeff: float, micro_batches: int) -> Callable[[], None]:
    """Have training also minimise coeff x the sum over PEER layers of their unevenness.

    The unevenness is computed per micro-batch of each process; its mean over micro-batches and processes is minimised.

    Args:
        micro_batches: of all processes in an optimizer step, since gradients are summed over them (train_step.py).
    Returns:
        What takes the loss off again when it is called.
    """
    loss = _BalanceLoss(model.args.peer.num_experts, coeff / micro_batches)
    layers = [peer for _, peer in peer_layers(model)]
    for peer in layers:
        peer.attach("loss", loss)

    def detach() -> None:
        for peer in layers:
            peer.detach(loss)

    return detach
