"""A resume with other weights, numbers of passes, files or readings: what goes on, what begins anew, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from corpora import make_loader, sample_texts, take, write_jsonl

from titan_peer.data.loader import TrainingLoader
from titan_peer.data_source import DataSource


def resumed(state: dict[str, Any], sources: list[DataSource], **settings: Any) -> TrainingLoader:
    loader = make_loader(sources, **settings)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


def as_saved_before(state: dict[str, Any]) -> dict[str, Any]:
    """A state as versions wrote it that took an ended source and one of weight 0 for the same."""
    for stream in state["streams"].values():
        mixture = stream["sequences"]
        del mixture["max_epochs"]
        mixture["stopped"] = False
        for entry in mixture["draw"].values():
            entry["active"] = not entry.pop("ended") and entry["weight"] > 0
    return state


def read_to_the_end(loader: TrainingLoader) -> int:
    """Tokens of source "a" when all sources have ended."""
    while next(loader)["num_bytes"] > 0:
        pass
    return int(loader.statistics()["data/a_tokens"])


@pytest.fixture
def two(tmp_path: Path) -> list[DataSource]:
    a = write_jsonl(tmp_path / "a.jsonl", sample_texts(0, 100))
    b = write_jsonl(tmp_path / "b.jsonl", sample_texts(800, 1600))
    return [DataSource(str(a), name="a"), DataSource(str(b), name="b")]


BYTES = {"tokenizer": "byte", "seq_len": 512, "num_streams": 2}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("mix_by", ["tokens", "documents"])
def test_a_source_of_weight_0_is_read_after_a_resume_with_a_weight(
    mix_by: str, old: bool, two: list[DataSource]
) -> None:
    two[0].weight = 0.0
    loader = make_loader(two, mix_by=mix_by, **BYTES)
    take(loader, 5)
    assert loader.statistics()["data/a_tokens"] == 0
    state = loader.state_dict()
    two[0].weight = 1.0
    loader = resumed(as_saved_before(state) if old and mix_by == "tokens" else state, two, mix_by=mix_by, **BYTES)
    before = loader.statistics()["data/b_tokens"]
    take(loader, 40)
    tokens = [loader.statistics()[f"data/{name}_tokens"] for name in "ab"]
    assert tokens[0] > 0
    if mix_by == "tokens":
        assert tokens[0] == pytest.approx(tokens[1] - before, rel=0.05)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("at_end", ["drop", "stop"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_source_that_ended_goes_on_when_it_may_be_read_more_often(
    passes: int, at_end: Any, old: bool, two: list[DataSource]
) -> None:
    source = dataclasses.replace(two[0], max_epochs=passes, at_end=at_end)
    once = sum(len(text.encode()) + 2 for text in sample_texts(0, 100))
    loader = make_loader([source], **BYTES)
    assert read_to_the_end(loader) == passes * once
    state = loader.state_dict()
    state = as_saved_before(state) if old else state
    more = resumed(state, [dataclasses.replace(source, max_epochs=passes + 2)], **BYTES)
    assert read_to_the_end(more) == (passes + 2) * once
    same = resumed(state, [source], **BYTES)
    assert next(same)["num_bytes"] == 0  # it has ended as before
    without_end = resumed(state, [dataclasses.replace(source, max_epochs=0, at_end="drop")], **BYTES)
    assert all(next(without_end)["num_bytes"] > 0 for _ in range(100))


def test_a_source_that_goes_on_beside_others_gets_its_share_from_there_not_what_it_missed(
    two: list[DataSource],
) -> None:
    two[0].max_epochs = 1
    loader = make_loader(two, **BYTES)
    take(loader, 100)
    before = loader.statistics()
    two[0].max_epochs = 0
    loader = resumed(loader.state_dict(), two, **BYTES)
    take(loader, 10)
    after = loader.statistics()
    added = [after[f"data/{name}_tokens"] - before[f"data/{name}_tokens"] for name in "ab"]
    assert added[0] == pytest.approx(added[1], rel=0.1)


def test_a_source_that_may_be_read_less_often_than_it_has_been_ends(two: list[DataSource]) -> None:
    loader = make_loader(two[:1], **BYTES)
    while loader.statistics()["data/a_epoch"] < 2:
        next(loader)
    take(loader, 3)
    loader = resumed(loader.state_dict(), [dataclasses.replace(two[0], max_epochs=1)], **BYTES)
    read_to_the_end(loader)


def test_a_resume_without_changes_keeps_an_ended_source_ended_and_the_order(two: list[DataSource]) -> None:
    two[0].max_epochs = 1
    straight = make_loader(two, **BYTES)
    take(straight, 60)
    again = resumed(straight.state_dict(), two, **BYTES)
    assert take(straight, 30) == take(again, 30)
