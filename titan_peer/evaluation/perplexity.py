"""The loss of a model on held-out text, from which perplexity and bits per byte follow (`metrics.HeldOutLoss`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from titan_peer.evaluation.language_model import LanguageModel
from titan_peer.metrics.logger import HeldOutLoss
from titan_peer.ops.cross_entropy import IGNORE_INDEX


@torch.no_grad()
def held_out_loss(
    summed_loss: Callable[[dict[str, Tensor]], Tensor],
    batches: Iterable[dict[str, Tensor]],
    sum_over_processes: Callable[[Tensor], Tensor] = lambda values: values,
    max_batches: int = -1,
) -> HeldOutLoss:
    """Run a model over held-out batches.

    Args:
        summed_loss: batch -> 0-d sum of -log p(label) over its labels (`Transformer.forward` with labels).
        batches: dicts with `labels` [B, S] (-100: not predicted) and `num_bytes` (0-d).
        sum_over_processes: adds a float64 tensor up over the processes that share the text.
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


def loss_on(model: LanguageModel, batches: Iterable[dict[str, Tensor]]) -> HeldOutLoss:
    """The loss of a model that is opened for evaluation, in its own precision."""
    transformer, device = model.generator.model, model.generator.device

    def summed_loss(batch: dict[str, Tensor]) -> Tensor:
        with model.precision():
            loss: Tensor = transformer(*(batch[key].to(device) for key in ("tokens", "document_ids", "labels")))
        return loss

    return held_out_loss(summed_loss, batches)
