"""How the next token is chosen."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_peer.common.characters import require_whole
from titan_peer.common.errors import UserError

_LEAST_TEMPERATURE = 1e-30  # as far as float32 goes; the most probable token has all the probability long before


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is drawn.

    The order is: repetition penalty, temperature, top-k, top-p, min-p, each on what the one before has left.

    Raises:
        UserError: a value is outside its range.
    """

    max_new_tokens: int = 64
    """Most tokens of the completion; the end of the model's context ends it earlier."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token always (greedy)."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in prompt or completion are divided (if positive) or multiplied by this (arXiv 1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; the text ends before the first of them."""
    ignore_eos: bool = False
    """Go on after the tokenizer's end token."""
    seed: int | None = None
    """Together with the prompt's place in the list fixes the completion, whatever else is in the batch; None: another one
    every time."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for key, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "must be 0 (greedy) or more, and finite"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be more than 0, and finite"),
            ("stop", all(self.stop), "must not contain the empty string"),
        ):
            if not ok:
                raise UserError(f"{key} = {getattr(self, key)!r}: {allowed}")
        for stop in self.stop:
            require_whole(stop, "stop")

    def random_numbers(self, place: int) -> random.Random:
        """The completion's own source of randomness: one number a token."""
        return random.Random() if self.seed is None else random.Random(f"{self.seed}/{place}")


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
        """Choose a token a sequence.

        Args:
            logits: float32 [B, vocab].
            uniform: float64 [B], a random number from [0, 1) each, which alone decides among the tokens left.
        Returns:
            int64 [B].
        """
        if self.seen is not None:
            penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen, penalised, logits)
        best = logits.argmax(dim=-1)
        if self.any_sampled:
            # the largest becomes 0, since it divided by a tiny temperature would be infinite
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
    """The index at which the running sum passes uniform x total; float64, as a vocabulary's sum needs."""
    sums = probabilities.double().cumsum(dim=-1)
    total = sums[:, -1]
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, threshold[:, None], right=True)[:, 0]
