"""Documents -> one endless stream of tokens -> sequences of equal length.

A document is [BOS] text [EOS]. The documents of an epoch, in an order that only seed and epoch decide, follow one another
without padding, epoch after epoch; sequence i is the stream's tokens from i * seq_len on. So the place of any sequence is
arithmetic: resuming needs one number and replays nothing, and any number of processes can share the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_peer.data.tokenizer import Tokenizer
from titan_peer.ops.cross_entropy import IGNORE_INDEX


class Span(NamedTuple):
    """A stretch of the stream: what one sequence is made from."""

    tokens: NDArray[np.int64]  # [S + 1], the last one only as a label
    documents: NDArray[np.int64]  # [S + 1], a number for each token's document
    bytes_per_label: NDArray[np.float64]  # [S + 1], UTF-8 bytes that a token, as a label, stands for


class PackedSequence(NamedTuple):
    tokens: NDArray[np.int64]  # [S]
    labels: NDArray[np.int64]  # [S]
    document_ids: NDArray[np.int32]  # [S], 0, 1, 2 ... within the sequence
    num_bytes: float  # UTF-8 bytes of the text its labels stand for


class TokenStream:
    """The endless stream.

    Args:
        documents: texts.
        shuffle: a new order of documents every epoch; else the order given.
    """

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer, *, seed: int, shuffle: bool) -> None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        encoded = [np.array([*bos, *ids, *eos], dtype=np.int32) for ids in tokenizer.encode_batch(documents)]
        self.lengths = np.array([len(ids) for ids in encoded])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = np.concatenate(encoded)
        # A document's first token is never a label; its bytes are spread evenly over the others.
        num_bytes = np.array([len(text.encode()) for text in documents], dtype=np.float64)
        self.bytes_per_label = num_bytes / np.maximum(self.lengths - 1, 1)
        self.seed, self.shuffle = seed, shuffle
        self._epoch = -1

    @property
    def tokens_per_epoch(self) -> int:
        return len(self.tokens)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        n = len(self.lengths)
        order = np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)
        lengths = self.lengths[order]
        first = np.cumsum(lengths) - lengths  # where each document begins in this epoch
        places = np.arange(self.tokens_per_epoch) + np.repeat(self.starts[order] - first, lengths)
        self._epoch_tokens = self.tokens[places]
        self._epoch_documents = np.repeat(order, lengths)
        self._epoch = epoch

    def span(self, start: int, length: int) -> Span:
        """The stream's tokens from `start` on, across epochs if need be."""
        parts = []
        while length > 0:
            epoch, offset = divmod(start, self.tokens_per_epoch)
            self._enter(epoch)
            taken = slice(offset, offset + length)
            tokens, documents = self._epoch_tokens[taken], self._epoch_documents[taken]
            # An epoch makes other documents of the same texts.
            numbers = documents + epoch * len(self.lengths)
            parts.append(Span(tokens.astype(np.int64), numbers, self.bytes_per_label[documents]))
            start, length = start + len(tokens), length - len(tokens)
        return Span(*map(np.concatenate, zip(*parts)))


def pack(span: Span) -> PackedSequence:
    """A sequence and its labels; the first token of a document is no label, since nothing before it tells of it."""
    tokens, documents, bytes_per_label = span
    same_document = documents[1:] == documents[:-1]
    labels = np.where(same_document, tokens[1:], IGNORE_INDEX)
    document_ids = np.concatenate([[0], np.cumsum(~same_document[:-1])]).astype(np.int32)
    return PackedSequence(tokens[:-1], labels, document_ids, float(bytes_per_label[1:][same_document].sum()))


def pad_span(span: Span, length: int, token: int) -> Span:
    """A span made longer by a last document of `token`s that is never learnt from (each token its own document)."""
    missing = length - len(span.tokens)
    return Span(
        np.concatenate([span.tokens, np.full(missing, token, dtype=np.int64)]),
        np.concatenate([span.documents, -1 - np.arange(missing)]),
        np.concatenate([span.bytes_per_label, np.zeros(missing)]),
    )
