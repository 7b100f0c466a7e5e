"""Training a byte-level BPE tokenizer on a source's text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from titan_peer.common.errors import UserError
from titan_peer.data.records import BadDocument, TokenizedText
from titan_peer.data.sources import Source

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with a begin and an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def texts_of(source: Source) -> Iterator[str]:
    """The documents in the order of the files.

    Raises:
        UserError: a bad document under on_bad_document = "error", or the source is tokenised already.
    """
    for chunk in tqdm(range(source.num_chunks), unit="chunk", disable=not sys.stderr.isatty(), desc="reading"):
        for record in source.records(chunk):
            if isinstance(record, TokenizedText):
                raise UserError(f"{source.key}.path = {source.config.path}: holds tokens, not text")
            if not isinstance(record, BadDocument):
                yield record
            elif source.config.on_bad_document == "error":
                raise source.refusal(record)
