"""The loss of a model on held-out text, from which perplexity and bits per byte follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titan_peer.metrics.sinks import Record
from titan_peer.ops.cross_entropy import IGNORE_INDEX

Batches = Iterable[dict[str, Tensor]]
"""Dicts with `labels` [B, S] (-100: not predicted), `num_bytes` (0-d) and what the model needs."""


class HeldOutLoss(NamedTuple):
    """Sums over held-out text."""

    loss_sum: float  # nats
    tokens: float  # learnt tokens
    num_bytes: float  # UTF-8 bytes they stand for

    @classmethod
    def over(cls, sets: Iterable[HeldOutLoss]) -> HeldOutLoss:
        """The sums over several sets."""
        return cls(*map(sum, zip(*sets)))

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss_sum / math.log(2) / max(self.num_bytes, 1)

    def record(self, prefix: str) -> Record:
        return {
            f"{prefix}loss": self.loss,
            f"{prefix}perplexity": self.perplexity,
            f"{prefix}bits_per_byte": self.bits_per_byte,
        }


@torch.no_grad()
def held_out_loss(
    summed_loss: Callable[[dict[str, Tensor]], Tensor],
    batches: Batches,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda values: values,
    max_batches: int = -1,
) -> HeldOutLoss:
    """Run a model over held-out batches.

    Args:
        summed_loss: batch -> 0-d sum of -log p(label) over its labels (`Transformer.forward` with labels).
        sum_over_processes: sums a float64 tensor over the processes that share the text.
        max_batches: stop after so many; -1: all.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # loss, predicted tokens, bytes
    for i, batch in enumerate(batches):
        if i == max_batches:
            break
        loss = summed_loss(batch)
        predicted = (batch["labels"] != IGNORE_INDEX).sum()
        sums += torch.stack([loss.double().cpu(), predicted.double(), batch["num_bytes"].double()])
    return HeldOutLoss(*sum_over_processes(sums).tolist())


@contextmanager
def evaluation_mode(model: nn.Module, stance: str) -> Iterator[None]:
    """A model in training is in evaluation mode inside, with this stance of the compiler."""
    model.eval()
    try:
        with torch.compiler.set_stance(stance):
            yield
    finally:
        model.train()


class TrainingModelLoss:
    """Measures the held-out loss of a model in training, by all processes together; each has its own batches.

    Args:
        summed_loss, sum_over_processes: as for `held_out_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        summed_loss: Callable[[dict[str, Tensor]], Tensor],
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.summed_loss, self.sum_over_processes = model, summed_loss, sum_over_processes
        # Compiling a second, inference-only graph on a CPU takes longer than it saves.
        self._stance = "force_eager" if device.type == "cpu" else "default"

    def __call__(self, batches: Batches, max_batches: int = -1) -> HeldOutLoss:
        with evaluation_mode(self.model, self._stance):
            return held_out_loss(self.summed_loss, batches, self.sum_over_processes, max_batches)
