"""One stream's share of a source: the documents in order, epoch after epoch, with a place that can be saved.

The chunks of a source are shuffled again every epoch and dealt to the streams in turn, so all streams together see
every document once per epoch. Within a stream documents pass through a window: the next `buffer_size` documents (or
`_WINDOW_BYTES`) are put in a random order that depends only on seed, epoch and place. The window's content is not part
of the state: a resume reads it again from where it began, which is at most one window, plus, in formats that can be
read only from their beginning, the part of the chunk before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from titan_peer.common.errors import UserError
from titan_peer.data.records import BadDocument, TokenizedText
from titan_peer.data.sources import Source
from titan_peer.data.tokenized import TokenizedShard
from titan_peer.data.tokenizer import Tokenizer

State = dict[str, Any]

_WINDOW_BYTES = 4 * 2**20
# Texts are tokenised in groups: large groups are faster, but would delay the first batch if there are many streams.
_FIRST_GROUP, _LARGEST_GROUP = 2**15, 2**17  # characters; each group is twice as large as the one before
# Longer texts are tokenised in pieces, since the time and memory of some tokenizers grow faster than the text.
_LONGEST_PIECE = 2**18


class Document(NamedTuple):
    """A document as tokens."""

    tokens: NDArray[np.int32]  # with begin and end token
    num_bytes: int  # of its text in UTF-8
    source: int  # the source's number in the job
    epoch: int  # of the source, from 0


class Documents(Protocol):
    """A source of documents that can be continued from a saved place."""

    def next(self) -> Document | None:
        """The next document, or None after the last one."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class DocumentEncoder:
    """Turns texts into tokens with begin and end tokens.

    Args:
        add_bos, add_eos: add the token if the vocabulary has one.
    """

    _threads: tuple[int, ThreadPoolExecutor] | None = None

    def __init__(self, tokenizer: Tokenizer, *, add_bos: bool = True, add_eos: bool = True) -> None:
        self.tokenizer = tokenizer
        self._bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        self._eos = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []

    def encode_texts(self, texts: list[str]) -> list[TokenizedText]:
        """Ids without begin and end tokens."""
        pieces = [list(_pieces(text)) for text in texts]
        ids = iter(self.tokenizer.encode_batch([piece for text in pieces for piece in text]))
        encoded = []
        for text, parts in zip(texts, pieces):
            arrays = [np.asarray(next(ids), dtype=np.int32) for _ in parts]
            num_bytes = len(text) if text.isascii() else len(text.encode())
            encoded.append(TokenizedText(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), num_bytes))
        return encoded

    def submit(self, texts: list[str]) -> Future[list[TokenizedText]]:
        """encode_texts in a thread of this process: tokenizers release Python's global interpreter lock."""
        if self._threads is None or self._threads[0] != os.getpid():  # threads do not survive a fork
            self._threads = (os.getpid(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer"))
        return self._threads[1].submit(self.encode_texts, texts)

    def with_borders(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        # Not np.concatenate: while the tokenizer's thread runs, it makes the whole loader a tenth slower (measured in
        # turns).
        first = len(self._bos)
        whole = np.empty(first + len(ids) + len(self._eos), dtype=np.int32)
        whole[:first] = self._bos
        whole[first : first + len(ids)] = ids
        whole[first + len(ids) :] = self._eos
        return whole


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most _LONGEST_PIECE characters, cut before white space where there is some."""
    while len(text) > _LONGEST_PIECE:
        cut = max(text.rfind(space, _LONGEST_PIECE // 2, _LONGEST_PIECE) for space in " \n")
        cut = cut if cut > 0 else _LONGEST_PIECE
        yield text[:cut]
        text = text[cut:]
    yield text


class _Group(NamedTuple):
    """Some documents of a window that are being tokenised."""

    window: State  # where their window begins
    first: int  # place of the first of them in the window
    records: list[str | TokenizedText]
    tokens: Future[list[TokenizedText]]  # of the texts among them


class DocumentStream:
    """The documents that stream `stream` of `num_streams` reads of one source.

    Args:
        number: the source's number in the job.
        seed: the job's seed.
        buffer_size: documents that are shuffled together; has no effect without shuffle.
    Raises (from next):
        UserError: a bad document under on_bad_document = "error", or no good document in the whole source.
    """

    _documents: list[Document]  # the next documents, in reverse order
    _following: _Group | None  # the group after them

    def __init__(
        self,
        source: Source,
        number: int,
        encoder: DocumentEncoder,
        *,
        stream: int,
        num_streams: int,
        seed: int,
        shuffle: bool,
        buffer_size: int,
    ) -> None:
        self.source, self.number, self.encoder = source, number, encoder
        self.stream, self.num_streams = stream, num_streams
        self.seed, self.shuffle, self.buffer_size = seed, shuffle, buffer_size
        self._enter({"epoch": 0, "chunk": 0, "record": 0, "index": 0, "skipped": 0})

    def next(self) -> Document | None:
        while not self._documents:
            group = self._following or self._next_group()
            if group is None:
                return None
            self._start, self._index = group.window, group.first
            self._documents = self._documents_of(group)
            self._following = self._next_group()  # is tokenised while these documents are used
        self._index += 1
        return self._documents.pop()

    def state_dict(self) -> State:
        return {**self._start, "index": self._index}

    def load_state_dict(self, state: State) -> None:
        self._enter(state)
        if state["index"]:
            self._fill_window()
            self._position = min(state["index"], len(self._window))  # the window is empty if max_epochs is lower now

    @property
    def skipped(self) -> int:
        """Bad documents left out so far."""
        return self._skipped

    # ---- internals

    def _enter(self, state: State) -> None:
        # where the next document is
        self._start = {k: state[k] for k in ("epoch", "chunk", "record", "skipped")}
        self._index = state["index"]  # in the window that begins at _start
        self._documents, self._following = [], None
        # how far has been read: in the epoch, and in the window
        self._epoch, self._chunk, self._record = state["epoch"], state["chunk"], state["record"]
        self._skipped = state["skipped"]
        self._window_start = self._start
        self._window: list[str | TokenizedText] = []
        self._position = 0
        self._group_size = _FIRST_GROUP
        self._records: Iterator[str | TokenizedText | BadDocument] | None = None

    def _next_group(self) -> _Group | None:
        """Send the next few documents to be tokenised; None at the end of the last epoch."""
        if self._position == len(self._window) and not self._fill_window():
            return None
        first, size = self._position, 0
        while self._position < len(self._window) and size < self._group_size:
            size += _size(self._window[self._position])
            self._position += 1
        self._group_size = min(2 * self._group_size, _LARGEST_GROUP)
        records = self._window[first : self._position]
        tokens = self.encoder.submit([record for record in records if isinstance(record, str)])
        return _Group(self._window_start, first, records, tokens)

    def _documents_of(self, group: _Group) -> list[Document]:
        texts = iter(group.tokens.result())
        documents = []
        for record in group.records:
            ids, num_bytes = next(texts) if isinstance(record, str) else record
            documents.append(Document(self.encoder.with_borders(ids), num_bytes, self.number, group.window["epoch"]))
        return documents[::-1]

    def _fill_window(self) -> bool:
        """Read the next window; False at the end of the last epoch."""
        empty_epochs = 0
        while True:
            self._window_start = {
                "epoch": self._epoch,
                "chunk": self._chunk,
                "record": self._record,
                "skipped": self._skipped,
            }
            self._window, self._position = [], 0
            if self.source.config.max_epochs and self._epoch >= self.source.config.max_epochs:
                return False
            epoch_ended = self._read_window()
            if self._window:
                break
            assert epoch_ended
            empty_epochs += 1
            if empty_epochs == self.num_streams:
                self.source.require_documents()  # otherwise this would loop forever
        if self.shuffle:
            place = [self.seed, self.source.seed, self.stream, *map(int, list(self._window_start.values())[:3])]
            order = np.random.default_rng(place).permutation(len(self._window))
            self._window = [self._window[i] for i in order]
        return True

    def _read_window(self) -> bool:
        """Read records until the window is full or the epoch ends; return whether the epoch ended."""
        chunks = self.source.order(self.seed, self._epoch, self.shuffle)
        # The streams rotate from epoch to epoch, so that no stream always gets the smallest share.
        chunks = chunks[(self.stream + self._epoch) % self.num_streams :: self.num_streams]
        size = 0
        while self._chunk < len(chunks):
            if self._records is None:
                self._records = self.source.records(int(chunks[self._chunk]), self._record)
            for record in self._records:
                self._record += 1
                if isinstance(record, BadDocument):
                    self._leave_out(record)
                    continue
                self._window.append(record)
                size += _size(record)
                if len(self._window) >= self.buffer_size or size >= _WINDOW_BYTES:
                    return False
            self._records = None
            self._chunk, self._record = self._chunk + 1, 0
        self._epoch, self._chunk = self._epoch + 1, 0
        return True

    def _leave_out(self, bad: BadDocument) -> None:
        if self.source.config.on_bad_document == "error":
            raise self.source.refusal(bad)
        self._skipped += 1


def _size(document: str | TokenizedText) -> int:
    return len(document) if isinstance(document, str) else document.num_bytes


def require_same_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Raise UserError if the source's tokens were made by another tokenizer, or stored too small for its ids."""
    made_by = source.tokenizer_fingerprint
    if made_by is not None and made_by != tokenizer.fingerprint:
        raise UserError(
            f"{source.key}.path = {source.config.path}: was tokenised with another tokenizer than model.tokenizer_path; "
            "use that one, or tokenise it again"
        )
    for part in source.parts:
        if isinstance(part, TokenizedShard):
            part.require_vocabulary(tokenizer.vocab_size, source.key)
