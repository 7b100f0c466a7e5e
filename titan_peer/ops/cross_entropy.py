"""Output projection and cross-entropy in one, per chunk of tokens, so that no [T, vocab] tensor ever exists.

A chunk's logits exist only while its loss and gradients are made: the gradients are computed in the forward pass
(softmax minus one-hot needs nothing from later layers) and only scaled in the backward pass. This takes three matmuls
per chunk, as many as a plain cross-entropy, and memory for [chunk, vocab] and one float32 gradient [vocab, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that is not learnt


def _chunk_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = (hidden @ weight.t()).float()  # [chunk, V]
    learnt = labels != IGNORE_INDEX
    target = labels.clamp_min(0)
    log_normaliser = torch.logsumexp(logits, dim=-1)
    nll = log_normaliser - logits.gather(1, target[:, None]).squeeze(1)
    return logits, torch.where(learnt, nll, 0.0).sum(), log_normaliser, target


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _chunk_logits(hidden, weight, labels)[1]


def _chunk_loss_and_logit_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, loss, log_normaliser, target = _chunk_logits(hidden, weight, labels)
    gradient = torch.exp(logits - log_normaliser[:, None])
    is_target = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    gradient = torch.where((labels != IGNORE_INDEX)[:, None], gradient - is_target.to(gradient.dtype), 0.0)
    return loss, gradient.to(hidden.dtype)  # [chunk, V]


_compiled_loss = torch.compile(_chunk_loss, dynamic=False)
_compiled_loss_and_logit_gradient = torch.compile(_chunk_loss_and_logit_gradient, dynamic=False)


def _num_chunks(num_tokens: int, chunk_size: int) -> int:
    """The fewest chunks of at most `chunk_size` tokens, or up to twice as many if they are then equal (one compiled
    shape)."""
    fewest = max(1, -(-num_tokens // chunk_size))
    return next((n for n in range(fewest, 2 * fewest + 1) if num_tokens % n == 0), fewest)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_chunks: int, compiled: bool) -> Tensor:
        step = _compiled_loss_and_logit_gradient if compiled else _chunk_loss_and_logit_gradient
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        # float32 for every compute dtype, since it is a sum over all chunks
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        chunks = zip(hidden.chunk(num_chunks), labels.chunk(num_chunks), hidden_gradient.chunk(num_chunks), strict=True)
        for hidden_chunk, label_chunk, hidden_gradient_chunk in chunks:
            chunk_loss, logit_gradient = step(hidden_chunk, weight, label_chunk)
            loss += chunk_loss
            torch.mm(logit_gradient, weight, out=hidden_gradient_chunk)
            if weight.dtype == torch.float32:
                weight_gradient.addmm_(logit_gradient.t(), hidden_chunk)
            else:
                weight_gradient += logit_gradient.t() @ hidden_chunk
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = grad_outputs[0]
        return hidden_gradient * scale, (weight_gradient * scale).to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int = 1024, compiled: bool = False
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label].

    Args:
        hidden: [T, D], float.
        weight: [vocab, D]; cast to the autocast dtype together with `hidden` if autocast is on.
        labels: int64 [T]; tokens labelled -100 are left out.
        chunk_size: the most tokens whose logits exist at the same time.
        compiled: fuse the passes over a chunk's logits with torch.compile.
    Returns:
        float32 scalar, a sum, not a mean: the caller knows the number of tokens of the whole global batch.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    num_chunks = _num_chunks(hidden.shape[0], chunk_size)
    with torch.autocast(device_type, enabled=False):
        if torch.is_grad_enabled():
            return _LinearCrossEntropy.apply(hidden, weight, labels, num_chunks, compiled)  # type: ignore[no-any-return]
        step = _compiled_loss if compiled else _chunk_loss
        chunks = zip(hidden.chunk(num_chunks), labels.chunk(num_chunks), strict=True)
        losses = [step(hidden_chunk, weight, label_chunk) for hidden_chunk, label_chunk in chunks]
        return torch.stack(losses).sum()
