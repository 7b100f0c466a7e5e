"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_peer.inference.sampling_params import SamplingParams

_LEAST_TEMPERATURE = 1e-30  # well within float32's range; the most probable token has probability 1 long before


class Sampler:
    """The parameters of the sequences of a batch, as tensors.

    Args:
        seen: bool [B, vocab], tokens of prompt and completion so far; None if no sequence has a repetition penalty.
    """

    def __init__(self, params: Sequence[SamplingParams], seen: Tensor | None, device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self.seen = seen
        self.penalty = column([p.repetition_penalty for p in params])
        self.greedy = torch.tensor([p.temperature == 0 for p in params], device=device)
        self.temperature = column([max(p.temperature, _LEAST_TEMPERATURE) if p.temperature else 1.0 for p in params])
        self.top_k = torch.tensor([p.top_k or 1 << 31 for p in params], device=device)[:, None]
        self.top_p, self.min_p = column([p.top_p for p in params]), column([p.min_p for p in params])
        self.any_sampled = any(p.temperature > 0 for p in params)
        self.any_truncated = any(p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p) for p in params)

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Choose one token per sequence.

        Args:
            logits: float32 [B, vocab].
            uniform: float64 [B], one random number from [0, 1) per sequence, which decides among the remaining tokens.
        Returns:
            int64 [B].
        """
        if self.seen is not None:
            penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen, penalised, logits)
        best = logits.argmax(dim=-1)
        if self.any_sampled:
            # shifted so that the largest is 0: divided by a tiny temperature, another value could become infinite
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
            drawn = self._draw_truncated(logits, uniform) if self.any_truncated else _draw(logits.softmax(-1), uniform)
            best = torch.where(self.greedy, best, drawn)
        if self.seen is not None:
            self.seen.scatter_(1, best[:, None], True)
        return best

    def _draw_truncated(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Inverse-CDF draw from the tokens that top-k, top-p and min-p leave."""
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
        return order.gather(1, _draw(self.truncate(logits), uniform)[:, None])[:, 0]

    def truncate(self, logits: Tensor) -> Tensor:
        """Unnormalised probabilities after top-k, top-p and min-p of logits sorted descending, [B, vocab]."""
        rank = torch.arange(logits.shape[1], device=logits.device)
        probabilities = logits.masked_fill(rank >= self.top_k, float("-inf")).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        keep = (before < self.top_p) & (probabilities >= self.min_p * probabilities[:, :1])
        keep[:, 0] = True
        return probabilities * keep


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the running sum passes uniform x total; in float64, which a sum over a vocabulary needs."""
    sums = probabilities.double().cumsum(dim=-1)
    total = sums[:, -1]
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, threshold[:, None], right=True)[:, 0]
