"""A model for evaluations: prompts in, text or log-likelihoods out; what is too long for the model is truncated."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from titan_peer.common.characters import with_whole_characters
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.inference.generator import Generator, SamplingParams

logger = logging.getLogger("titan_peer")

# How many batches run between two checks whether to stop; pairs are sorted by length within that many batches.
_BATCHES_A_CHUNK = 32


class EvaluationStoppedError(Exception):
    """The process has been told to stop, so the evaluation is broken off."""


@dataclass
class LanguageModel:
    """The interface that the adapters use, on top of `inference/generator.py`."""

    generator: Generator
    max_new_tokens: int
    """Tokens per completion if an evaluation does not specify it."""
    batch_size: int
    """Sequences per forward pass."""
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes the context in which every pass runs, such as autocast."""
    should_stop: Callable[[], bool] = lambda: False
    """Called between batches; True ends the evaluation with EvaluationStoppedError."""
    _said_truncated: bool = field(default=False, init=False)
    _said_broken: bool = field(default=False, init=False)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.generator.tokenizer

    @property
    def max_seq_len(self) -> int:
        return self.generator.model.args.max_seq_len

    @property
    def prefix_id(self) -> int:
        """The token that begins a document; the log-likelihood of a whole text is conditioned on it."""
        known = (token for token in (self.tokenizer.bos_id, self.tokenizer.eos_id) if token is not None)
        unused = set(self.tokenizer.unused_ids)
        return next(known, next(i for i in range(self.tokenizer.vocab_size) if i not in unused))

    def sampling(
        self,
        max_new_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        stop: str | Sequence[str] | None,
    ) -> SamplingParams:
        """Sampling parameters for an evaluation's completions; None stands for greedy and for the default length."""
        stop = [stop] if isinstance(stop, str) else stop or []
        stop = [
            text for text in stop if text and text == with_whole_characters(text)
        ]  # the model can never write others
        return SamplingParams(
            max_new_tokens=min(max_new_tokens or self.max_new_tokens, self.max_seq_len // 2),
            temperature=temperature or 0.0,
            top_p=1.0 if top_p is None else top_p,
            stop=tuple(stop),
            seed=0,
        )

    def whole(self, text: str) -> str:
        """The text with lone surrogates, which JSON can contain, replaced by U+FFFD; logged once."""
        whole = with_whole_characters(text)
        if whole != text and not self._said_broken:
            logger.warning("evaluation: a sample has half of a surrogate pair; the model is shown U+FFFD in its place")
            self._said_broken = True
        return whole

    def complete(self, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[str]:
        """The text that the model writes after each prompt; prompts that are too long are cut off at their
        beginning."""
        ids = []
        for prompt, sampling in zip(prompts, params, strict=True):
            encoded = self.generator.encode(self.whole(prompt)) if prompt else [self.prefix_id]
            ids.append(self._last(encoded, self.max_seq_len - sampling.max_new_tokens))
        texts = [""] * len(ids)
        with self._progress(len(ids)) as progress, torch.inference_mode(), self.precision():
            for piece in self.generator.stream(ids, params):
                self._stop_if_told()
                if piece.completion is not None:
                    texts[piece.index] = piece.completion.text
                    progress.update()
        return texts

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]] | Sequence[tuple[str, str]]
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context), in nats, and whether greedy decoding would give the continuation.

        Args:
            pairs: (context, continuation), both text or both ids; pairs that are too long are cut off at their
                beginning.
        """
        fitting = [
            (self.whole(c), self.whole(t)) if isinstance(c, str) and isinstance(t, str) else (c, t[-self.max_seq_len :])
            for c, t in pairs
        ]
        size = _BATCHES_A_CHUNK * self.batch_size
        scores: list[tuple[float, bool]] = []
        with self._progress(len(fitting)) as progress, torch.inference_mode(), self.precision():
            for start in range(0, len(fitting), size):
                self._stop_if_told()
                chunk = self.generator.log_likelihoods(fitting[start : start + size], batch_size=self.batch_size)
                scores += [(score.sum_logprob, score.is_greedy) for score in chunk]
                progress.update(len(chunk))
        return scores

    def _progress(self, total: int) -> tqdm[None]:
        """A progress bar on a terminal, if there are more than a few batches; otherwise a hidden one."""
        hidden = not sys.stderr.isatty() or total <= 4 * self.batch_size
        return tqdm(total=total, leave=False, dynamic_ncols=True, disable=hidden)

    def _stop_if_told(self) -> None:
        if self.should_stop():
            raise EvaluationStoppedError("the job has been told to stop")

    def _last(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        if not self._said_truncated:
            logger.warning(
                "evaluation: a prompt of %d tokens does not fit model.max_seq_len = %d; such prompts are cut off at their beginning",
                len(ids),
                self.max_seq_len,
            )
            self._said_truncated = True
        # the begin token is kept, so that the model sees documents begin as in training
        return [ids[0], *ids[len(ids) - room + 1 :]] if ids[0] == self.tokenizer.bos_id else ids[-room:]
