"""A user's settings of how completions are drawn, and their bounds. Without torch, so that a mistake is reported at
once."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from titan_peer.common.characters import require_whole
from titan_peer.common.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is drawn.

    The order is: repetition penalty, temperature, top-k, top-p, min-p; each works on the result of the one before.

    Raises:
        UserError: a value is outside its range.
    """

    max_new_tokens: int = 64
    """The most tokens of the completion; it ends earlier at the end of the model's context."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable token (greedy)."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in prompt or completion are divided (if positive) or multiplied by this (arXiv
    1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; the text ends before the first of them."""
    ignore_eos: bool = False
    """Continue after the tokenizer's end token."""
    seed: int | None = None
    """Together with the prompt's place in the list it fixes the completion, regardless of the rest of the batch; None:
    the completion differs every time."""

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
        """The completion's own random numbers, one per token."""
        return random.Random() if self.seed is None else random.Random(f"{self.seed}/{place}")
