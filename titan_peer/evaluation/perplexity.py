"""The held-out loss of a model that is opened for evaluation, from which its perplexity follows."""

from __future__ import annotations

from torch import Tensor

from titan_peer.evaluation.language_model import LanguageModel
from titan_peer.metrics.held_out_loss import Batches, HeldOutLoss, held_out_loss


def loss_on(model: LanguageModel, batches: Batches) -> HeldOutLoss:
    """The loss of a model in its own precision."""
    transformer, device = model.generator.model, model.generator.device

    def summed_loss(batch: dict[str, Tensor]) -> Tensor:
        with model.precision():
            loss: Tensor = transformer(*(batch[key].to(device) for key in ("tokens", "document_ids", "labels")))
        return loss

    return held_out_loss(summed_loss, batches)
