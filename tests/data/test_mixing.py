"""The mix that is read is the configured one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import make_loader, sample_texts, take, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_peer.config.data_source import DataSource
from titan_peer.data.mixing import WeightedDraw


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.lists(st.integers(1, 100), min_size=1, max_size=300),
)
def test_no_source_is_ever_more_than_a_few_draws_from_its_share(weights: list[float], amounts: list[int]) -> None:
    n = len(weights)
    draw = WeightedDraw(list("abcdef"[:n]), weights, np.random.default_rng(0).uniform(0, 100, n).tolist())
    taken = np.zeros(n)
    for amount in amounts:
        which = draw.draw()
        assert which is not None
        draw.add(which, amount)
        taken[which] += amount
        off = taken - taken.sum() * np.array(weights) / sum(weights)
        assert np.abs(off).max() <= n * 200


def mix(folder: Path, lengths: tuple[int, ...] = (1, 1, 4)) -> list[DataSource]:
    """Three sources whose documents differ in length: this many texts are joined into one document."""
    sources = []
    for i, (length, weight) in enumerate(zip(lengths, (0.7, 0.2, 0.1))):
        texts = sample_texts(i * 800, (i + 1) * 800)
        joined = ["\n".join(texts[j : j + length]) for j in range(0, len(texts), length)]
        path = write_jsonl(folder / f"{i}.jsonl", joined)
        sources.append(DataSource(str(path), name=str(i), weight=weight))
    return sources


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_token_shares_are_the_weights_in_every_packing_mode(packing: str, tmp_path: Path) -> None:
    loader = make_loader(mix(tmp_path), packing=packing, seq_len=128, tokenizer="byte")
    take(loader, 200)
    shares = [loader.statistics()[f"data/{i}_share"] for i in range(3)]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.005)


def test_mixed_by_documents_the_documents_have_the_weights(tmp_path: Path) -> None:
    loader = make_loader(mix(tmp_path), mix_by="documents", tokenizer="byte", seq_len=512)
    lengths = [np.mean([len(t) + 2 for t in sample_texts(i * 800, (i + 1) * 800)]) for i in range(3)]
    take(loader, 300)
    tokens = np.array([loader.statistics()[f"data/{i}_tokens"] for i in range(3)])
    documents = tokens / (np.array(lengths) * [1, 1, 4])
    assert documents / documents.sum() == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


def test_a_source_that_ends_drops_out_and_the_others_keep_their_proportion(tmp_path: Path) -> None:
    sources = mix(tmp_path, (1, 1, 1))
    sources[1].max_epochs = 1
    loader = make_loader(sources, tokenizer="byte", seq_len=512)
    whole = sum(len(t.encode()) + 2 for t in sample_texts(800, 1600))
    while loader.statistics()["data/1_tokens"] < whole:
        next(loader)
    before = loader.statistics()
    take(loader, 200)
    after = loader.statistics()
    added = [after[f"data/{i}_tokens"] - before[f"data/{i}_tokens"] for i in range(3)]
    assert added[1] == 0
    assert added[0] / (added[0] + added[2]) == pytest.approx(0.7 / 0.8, abs=0.01)


def test_a_source_that_ends_can_end_the_job(tmp_path: Path) -> None:
    sources = mix(tmp_path, (1, 1, 1))
    sources[1].max_epochs, sources[1].at_end = 1, "stop"
    loader = make_loader(sources, tokenizer="byte", seq_len=512)
    while next(loader)["num_bytes"] > 0:
        pass
    statistics = loader.statistics()
    assert statistics["data/1_tokens"] == sum(len(t.encode()) + 2 for t in sample_texts(800, 1600))
    assert statistics["data/0_share"] == pytest.approx(0.7, abs=0.02)


def test_a_source_begins_again_in_a_new_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(300)])
    orders = []
    loader = make_loader([DataSource(str(path))], tokenizer="byte", packing="pad", seq_len=32, global_batch_size=10)
    for _ in range(2):
        epoch = []
        for _ in range(30):
            batch = next(loader)
            epoch += [bytes(row[row < 256].tolist()).decode() for row in batch["tokens"]]
        orders.append(epoch)
    assert loader.statistics()[f"data/{path}_epoch"] >= 1
    assert orders[0] != orders[1]
    assert len(set(orders[0])) > 280  # streams differ in length by a few documents
