"""Every token of every document is the input of exactly one position, in every mode."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import make_loader, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_peer.config.data_source import DataSource
from titan_peer.data.packing import (
    PackedSequence,
    PackingFormat,
    PackingMode,
    Piece,
    best_fit_decreasing,
    make_packer,
)
from titan_peer.data.streams import Document
from titan_peer.ops.cross_entropy import IGNORE_INDEX

PAD = 0
MODES: tuple[PackingMode, ...] = ("concat", "best_fit", "pad")


class Listed:
    """Documents from a list."""

    def __init__(self, lengths: Sequence[int]) -> None:
        ends = np.cumsum(lengths)
        # all tokens differ, so a lost or repeated one is detected
        tokens = [np.arange(end - n, end, dtype=np.int32) + 1 for n, end in zip(lengths, ends)]
        self.documents = [Document(t, 10 * len(t), source=i % 2, epoch=i) for i, t in enumerate(tokens)]
        self.position = 0

    def next(self) -> Document | None:
        if self.position == len(self.documents):
            return None
        self.position += 1
        return self.documents[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def packed(packer: Any) -> list[PackedSequence]:
    return list(iter(packer.next, None))


lengths_and_seq_len = (st.lists(st.integers(1, 70), max_size=60), st.integers(1, 33), st.sampled_from(MODES))


@settings(max_examples=200, deadline=None)
@given(*lengths_and_seq_len)
def test_every_token_once_and_every_label_the_next_token(lengths: list[int], seq_len: int, mode: PackingMode) -> None:
    documents = Listed(lengths)
    last = {int(d.tokens[-1]) for d in documents.documents}
    sequences = packed(make_packer(mode, documents, PackingFormat(seq_len, 2, PAD)))
    inputs = np.concatenate([s.tokens for s in sequences]) if sequences else np.empty(0)
    assert sorted(inputs[inputs != PAD]) == list(range(1, sum(lengths) + 1))
    for s in sequences:
        assert s.num_tokens == (s.tokens != PAD).sum() > 0
        for token, label in zip(s.tokens.tolist(), s.labels.tolist()):
            assert label == (IGNORE_INDEX if token == PAD or token in last else token + 1)
    # a document of one token has no label, and so no bytes
    counted = sum(s.num_bytes for s in sequences)
    assert counted == pytest.approx(sum(10 * n for n in lengths if n > 1))


@settings(max_examples=100, deadline=None)
@given(*lengths_and_seq_len)
def test_document_ids_follow_the_documents(lengths: list[int], seq_len: int, mode: PackingMode) -> None:
    documents = Listed(lengths)
    owner = {int(t): i for i, d in enumerate(documents.documents) for t in d.tokens}
    for s in packed(make_packer(mode, documents, PackingFormat(seq_len, 2, PAD))):
        number = [owner.get(int(t), -1 - place) for place, t in enumerate(s.tokens)]  # padding: a number each
        same = [a == b for a, b in pairwise(number)]
        assert [a == b for a, b in pairwise(s.document_ids)] == same
        is_token = np.array([n >= 0 for n in number])
        assert ((s.document_ids >= 0) == is_token).all()
        assert s.document_ids[0] == 0 and set(np.diff(s.document_ids[is_token])) <= {0, 1}


@settings(max_examples=100, deadline=None)
@given(*lengths_and_seq_len, st.data())
def test_a_packer_goes_on_from_its_state(lengths: list[int], seq_len: int, mode: PackingMode, data: Any) -> None:
    format = PackingFormat(seq_len, 2, PAD, mask_borders=data.draw(st.booleans()))
    straight = make_packer(mode, Listed(lengths), format)
    resumed = make_packer(mode, Listed(lengths), format)
    for _ in range(data.draw(st.integers(0, 20))):
        straight.next()
    resumed.load_state_dict(straight.state_dict())
    for a, b in zip(packed(straight), packed(resumed), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 40))
def test_best_fit_splits_no_document_and_leaves_none_alone_that_fits_elsewhere(
    lengths: list[int], capacity: int
) -> None:
    pieces = [Piece(d, 0, len(d.tokens)) for d in Listed(lengths).documents]
    bins = best_fit_decreasing(pieces, capacity)
    assert sorted(id(p.document) for b in bins for p in b) == sorted(id(p.document) for p in pieces)
    assert all(sum(map(len, b)) <= capacity for b in bins)
    # a piece is alone only if no other bin had room for it
    free = [capacity - sum(map(len, b)) for b in bins]
    for i, b in enumerate(bins):
        if len(b) == 1:
            assert all(f < len(b[0]) for j, f in enumerate(free) if j != i and len(bins[j]) > 1)


def test_best_fit_fills_sequences_of_real_text(tmp_path: Path) -> None:
    from corpora import SAMPLE

    loader = make_loader([DataSource(str(SAMPLE))], packing="best_fit", seq_len=512, num_streams=1)
    for _ in range(8):
        next(loader)
    filled = loader.statistics()[f"data/{SAMPLE}_tokens"] / (8 * 8 * 512)
    assert filled > 0.98


def test_without_masks_the_last_token_of_a_document_predicts_the_next_one() -> None:
    format = PackingFormat(4, 2, PAD, mask_borders=False)
    first, second = packed(make_packer("concat", Listed([3, 1, 4]), format))
    assert first.tokens.tolist() == [1, 2, 3, 4] and first.labels.tolist() == [2, 3, 4, 5]
    assert second.labels.tolist() == [6, 7, 8, IGNORE_INDEX]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=120),
    st.integers(2, 65),
    st.sampled_from(MODES),
    st.sampled_from((1, 2, 8)),
    st.booleans(),
)
def test_an_epoch_of_files_gives_every_document_once_and_whole(
    lengths: list[int], seq_len: int, mode: PackingMode, num_streams: int, shuffle: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # each text is its number and as many letters as hypothesis draws; with bytes, each token is one byte
        texts = [f"{i} " + "abcdefg"[i % 7] * n for i, n in enumerate(lengths)]
        file = write_jsonl(Path(folder) / "a.jsonl", texts)
        source = DataSource(str(file), max_epochs=1)
        loader = make_loader(
            [source],
            seq_len=seq_len,
            tokenizer="byte",
            packing=mode,
            num_streams=num_streams,
            shuffle=shuffle,
            shuffle_buffer_size=7,
        )
        found, total = np.zeros(258, np.int64), sum(len(t) + 2 for t in texts)
        for _ in range(-(-total // seq_len) * num_streams + 200 * len(texts)):
            batch = next(loader)
            real = (batch["labels"] != IGNORE_INDEX) | (batch["tokens"] != 257) | (batch["document_ids"] == 0)
            if not (batch["labels"] != IGNORE_INDEX).any():
                break
            # labels are all tokens but the first of each document: count them, then the begin tokens
            learnt = batch["labels"][batch["labels"] != IGNORE_INDEX].numpy()
            found += np.bincount(learnt, minlength=258)
            found[256] += int(((batch["tokens"] == 256) & real).sum())
        expected = np.bincount(np.concatenate([[256, *t.encode(), 257] for t in texts]).astype(np.int64), minlength=258)
        assert np.array_equal(found, expected)
