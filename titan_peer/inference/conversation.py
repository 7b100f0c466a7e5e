"""A conversation with a model: the user and the model continue one text in turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from titan_peer.inference.generator import Generator
from titan_peer.inference.sampling_params import SamplingParams

logger = logging.getLogger("titan_peer")


class Conversation:
    """The text so far, as far as it fits into the model's context, is what the model continues."""

    def __init__(self, generator: Generator, sampling: SamplingParams) -> None:
        self.generator, self.sampling = generator, sampling
        self._context: list[int] = []

    def forget(self) -> None:
        """Begin a new text."""
        self._context = []

    def reply(self, line: str) -> Iterator[str]:
        """How the model continues the text and `line`, piece by piece.

        A reply that is not read to its end does not become part of the text; the line does.
        """
        generator, context = self.generator, self._context
        context += generator.tokenizer.encode_batch([line])[0] if context else generator.encode(line)
        longest = generator.model.args.max_seq_len
        room = longest - min(self.sampling.max_new_tokens, longest // 2)
        if len(context) > room:
            logger.info("the context is full: its beginning is forgotten")
            del context[:-room]
        for piece in generator.stream([context], self.sampling):
            yield piece.text
            if piece.completion is not None:
                ids = piece.completion.token_ids
                context += ids[:-1] if piece.completion.finish_reason == "eos" else ids
