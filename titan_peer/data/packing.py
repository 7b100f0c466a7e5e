"""Documents -> sequences of equal length.

concat    documents one after the other, cut every seq_len tokens; padding only at the end of the last epoch
best_fit  documents longer than seq_len are cut into pieces; each piece goes whole into the fullest sequence that has room
          for it (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830); the rest of a sequence is padding
pad       one document, or one piece of a longer document, per sequence

In each mode every token of every document is the input of exactly one position. A position's label is the next token of
its document, even if that token is in the next sequence.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_peer.data.streams import Document, Documents, State
from titan_peer.ops.cross_entropy import IGNORE_INDEX

PackingMode = Literal["concat", "best_fit", "pad"]

# best_fit packs this many sequences' worth of documents at a time.
_SEQUENCES_AT_A_TIME = 64


class PackedSequence(NamedTuple):
    tokens: NDArray[np.int32]  # [S]
    labels: NDArray[np.int32]  # [S], IGNORE_INDEX: not learnt
    document_ids: NDArray[np.int32]  # [S], 0, 1, 2 ... within the sequence; padding -1, -2, -3 ...
    num_bytes: float  # UTF-8 bytes of the text its labels stand for
    source_tokens: NDArray[np.int64]  # [sources], tokens of each source, padding left out
    epochs: NDArray[np.int64]  # [sources], epoch of each source's latest document; -1: none here

    @property
    def num_tokens(self) -> int:
        return int(self.source_tokens.sum())


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: Document
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class PackingFormat(NamedTuple):
    """What all sequences of a job have in common."""

    seq_len: int
    num_sources: int
    pad_token: int
    mask_borders: bool = True
    """If true, the last token of a document has no label; otherwise its label is the next document's first token."""

    def sequence(self, pieces: Sequence[Piece], following: int | None = None) -> PackedSequence:
        """The pieces one after the other, padded to seq_len.

        Args:
            following: with mask_borders false, the token that comes after the last piece if that ends its document.
        """
        tokens = np.full(self.seq_len, self.pad_token, np.int32)
        labels = np.full(self.seq_len, IGNORE_INDEX, np.int32)
        document_ids = np.zeros(self.seq_len, np.int32)
        source_tokens = np.zeros(self.num_sources, np.int64)
        epochs = np.full(self.num_sources, -1, np.int64)
        num_bytes, end = 0.0, 0
        for number, (document, start, stop) in enumerate(pieces):
            begin, end = end, end + stop - start
            tokens[begin:end] = document.tokens[start:stop]
            known = document.tokens[start + 1 : stop + 1]
            labels[begin : begin + len(known)] = known
            document_ids[begin:end] = number
            # a document's first token is never one of its labels, so its bytes are spread evenly over the other tokens
            num_bytes += document.num_bytes * len(known) / max(len(document.tokens) - 1, 1)
            source_tokens[document.source] += stop - start
            epochs[document.source] = max(epochs[document.source], document.epoch)
            if not self.mask_borders and stop == len(document.tokens):
                after = pieces[number + 1].document.tokens[0] if number + 1 < len(pieces) else following
                labels[end - 1] = IGNORE_INDEX if after is None else after
        document_ids[end:] = -1 - np.arange(self.seq_len - end)
        return PackedSequence(tokens, labels, document_ids, num_bytes, source_tokens, epochs)

    def empty(self) -> PackedSequence:
        """A sequence of padding."""
        return self.sequence(())


class InOrderPacker:
    """concat and pad: documents as they come, one sequence after the other."""

    def __init__(self, documents: Documents, format: PackingFormat, *, one_document: bool) -> None:
        self.documents, self.format, self.one_document = documents, format, one_document
        self._before = documents.state_dict()  # the place before the current document
        self._current: Document | None = None
        self._offset = 0  # tokens of it that are packed already
        # With mask_borders false the document after the last must be looked at; it then becomes the current one.
        self._ended = False

    def next(self) -> PackedSequence | None:
        """The next sequence, or None after the last one."""
        pieces: list[Piece] = []
        free = self.format.seq_len
        while free and self._have_document():
            assert self._current is not None
            stop = min(self._offset + free, len(self._current.tokens))
            pieces.append(Piece(self._current, self._offset, stop))
            free -= stop - self._offset
            self._offset = stop
            if self.one_document:
                break
        if not pieces:
            return None
        following = None
        if not self.format.mask_borders and not self.one_document and self._have_document():
            assert self._current is not None
            following = int(self._current.tokens[0])
        return self.format.sequence(pieces, following)

    def _have_document(self) -> bool:
        """Make sure that the current document has tokens left; False at the end."""
        while self._current is None or self._offset >= len(self._current.tokens):
            self._before, self._offset = self.documents.state_dict(), 0
            self._current = self.documents.next()
            if self._current is None:
                return False
        return True

    def state_dict(self) -> State:
        return {"documents": self._before, "offset": self._offset}

    def load_state_dict(self, state: State) -> None:
        self.documents.load_state_dict(state["documents"])
        self._before = self.documents.state_dict()
        self._offset = state["offset"]
        self._current = self.documents.next() if self._offset else None


class BestFitPacker:
    """best_fit: packs _SEQUENCES_AT_A_TIME sequences at a time, from as many documents as fill them."""

    def __init__(self, documents: Documents, format: PackingFormat) -> None:
        self.documents, self.format = documents, format
        self._before = documents.state_dict()
        self._bins: list[list[Piece]] = []
        self._done = 0  # of the bins

    def next(self) -> PackedSequence | None:
        """The next sequence, or None after the last one."""
        if self._done == len(self._bins):
            self._fill()
            if not self._bins:
                return None
        self._done += 1
        return self.format.sequence(self._bins[self._done - 1])

    def _fill(self) -> None:
        self._before, self._done = self.documents.state_dict(), 0
        seq_len = self.format.seq_len
        pieces: list[Piece] = []
        tokens = 0
        while tokens < _SEQUENCES_AT_A_TIME * seq_len and (document := self.documents.next()) is not None:
            length = len(document.tokens)
            pieces += [Piece(document, a, min(a + seq_len, length)) for a in range(0, length, seq_len)]
            tokens += length
        self._bins = best_fit_decreasing(pieces, seq_len)

    def state_dict(self) -> State:
        return {"documents": self._before, "bins": self._done, "seq_len": self.format.seq_len}

    def load_state_dict(self, state: State) -> None:
        self.documents.load_state_dict(state["documents"])
        self._before, self._bins, self._done = self.documents.state_dict(), [], 0
        if state["bins"]:
            self._fill()
            self._done = state["bins"]


def best_fit_decreasing(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Put pieces into bins of `capacity` tokens, the longest first, each into the fullest bin that has room for it.

    The bins, and the pieces in each, keep the order in which the pieces were given.
    """
    order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i]), i))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for i in order:
        length = len(pieces[i])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, number = room.pop(place)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        if free > length:
            insort(room, (free - length, number))
    return [[pieces[i] for i in members] for members in sorted(sorted(b) for b in bins)]


Packer = InOrderPacker | BestFitPacker


def make_packer(mode: PackingMode, documents: Documents, format: PackingFormat) -> Packer:
    if mode == "best_fit":
        return BestFitPacker(documents, format)
    return InOrderPacker(documents, format, one_document=mode == "pad")
