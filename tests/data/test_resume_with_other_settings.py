"""A resume with other weights, numbers of passes, files or ways to read them: what continues, what begins anew, what is
refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpora import ROOT, SAMPLE, make_loader, sample_texts, take, write_jsonl, write_parquet

from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.parse import load_config
from titan_peer.data import identity
from titan_peer.data.loader import TrainingLoader
from titan_peer.data.sources import open_source


def resumed(state: dict[str, Any], sources: list[DataSource], **settings: Any) -> TrainingLoader:
    loader = make_loader(sources, **settings)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


def as_saved_before(state: dict[str, Any]) -> dict[str, Any]:
    """A state as written by versions that stored less about the sources and did not distinguish an ended source from
    one of weight 0."""
    del state["settings"]
    for entry in state["sources"].values():
        for key in ("content", "modified", "reading", "seed"):
            del entry[key]
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


# --------------------------------------------------------------------------------------------------------------------
# Files and readings


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("titan_peer"), "propagate", True)
    caplog.set_level(logging.INFO, "titan_peer")
    return caplog


def two_columns(folder: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "a.jsonl"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"text_key": "body"}, ".text_key = 'body': the checkpoint was made with 'text'"),
        ({}, {"template": "{{ body }}"}, ".template = '{{ body }}': the checkpoint was made with 'another key'"),
        (
            {"template": "{{ body }}"},
            {"template": "{{ text }}"},
            ".template = '{{ text }}': the checkpoint was made with",
        ),
        ({"template": "{{ body }}"}, {}, ".text_key = 'text': the checkpoint was made with 'another key'"),
        ({}, {"max_document_bytes": 10**5}, ".max_document_bytes = 100000: the checkpoint was made with 33554432"),
        (
            {"on_bad_document": "skip", "max_document_bytes": 10**5},
            {"on_bad_document": "skip"},
            ".max_document_bytes = 33554432: the checkpoint was made with 100000",
        ),
    ],
)
def test_another_reading_of_the_same_files_is_refused(
    first: dict[str, Any], second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = str(two_columns(tmp_path, sample_texts(0, 50)))
    loader = make_loader([DataSource(path, **first)], **BYTES)
    take(loader, 1)
    with pytest.raises(UserError) as caught:
        resumed(loader.state_dict(), [DataSource(path, **second)], **BYTES)
    assert "data.sources[0]" + message in str(caught.value)
    assert "go back to that, or give another data.sources[0].name" in str(caught.value)


@pytest.mark.parametrize("cure", [{"on_bad_document": "skip"}, {"max_document_bytes": 10**6}])
def test_a_job_that_stopped_at_a_bad_document_goes_on_with_what_its_message_advises(
    cure: dict[str, Any], tmp_path: Path
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [*sample_texts(0, 50), "x" * 10**5]))
    source = DataSource(path, max_epochs=1, max_document_bytes=90_000)
    settings = {**BYTES, "shuffle": False, "num_streams": 1}
    loader = make_loader([source], **settings, shuffle_buffer_size=10)
    take(loader, 1)
    state = loader.state_dict()
    with pytest.raises(UserError, match="is a document of 100,"):
        take(loader, 1000)
    resumed(state, [dataclasses.replace(source, **cure)], **settings, shuffle_buffer_size=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shuffle": False}, "data.shuffle = false: the checkpoint was made with true"),
        ({"shuffle_buffer_size": 7}, "data.shuffle_buffer_size = 7: the checkpoint was made with 1000"),
        ({"seed": 2}, "debug.seed = 2: the checkpoint was made with 1"),
        ({"add_bos": False}, "data.add_bos = false: the checkpoint was made with true"),
        ({"add_eos": False}, "data.add_eos = false: the checkpoint was made with true"),
    ],
)
def test_another_order_or_other_borders_are_refused(
    change: dict[str, Any], message: str, two: list[DataSource]
) -> None:
    state = make_loader(two, **BYTES).state_dict()
    with pytest.raises(UserError, match=message):
        resumed(state, two, **BYTES, **change)
    resumed(as_saved_before(state), two, **BYTES, **change)  # the state does not say what the file was


def write(kind: str, path: Path, texts: list[str]) -> Path:
    if kind == "jsonl":
        return write_jsonl(path / "a.jsonl", texts)
    if kind == "gz":
        return write_jsonl(path / "a.jsonl.gz", texts, lambda *a, **k: gzip.open(*a, compresslevel=0, **k))
    if kind == "parquet":
        return write_parquet(path / "a.parquet", texts)
    (path / "a").mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (path / f"a/{i:03}.txt").write_text(text, encoding="utf-8")
    return path / "a"


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "txt"])
def test_an_edit_that_leaves_the_size_is_seen(kind: str, tmp_path: Path) -> None:
    texts = sample_texts(0, 60)
    source = DataSource(str(write(kind, tmp_path, texts)), name="a")
    state = make_loader([source], **BYTES).state_dict()
    write(kind, tmp_path, texts)
    resumed(state, [source], **BYTES)  # the same bytes, written anew
    changed = texts[30].translate(str.maketrans("e", "a"))
    assert changed != texts[30]
    write(kind, tmp_path, [*texts[:30], changed, *texts[31:]])
    with pytest.raises(UserError, match=r"data.sources\[0\].path = .*: its files have changed since the checkpoint"):
        resumed(state, [source], **BYTES)


def test_of_a_large_file_a_later_edit_between_the_samples_is_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sample_texts() * 3)
    assert path.stat().st_size > 3 * 2**20
    source = DataSource(str(path), name="a")
    state = make_loader([source], **BYTES).state_dict()
    size = path.stat().st_size
    in_the_middle = (size - 2**14) * 31 // 63 + 7  # of the 32nd of 64 blocks
    for place, is_seen in ((12, True), (2**14 + 9, False), (in_the_middle, True), (size - 5, True)):
        before = path.read_bytes()
        path.write_bytes(before[:place] + b"!" + before[place + 1 :])
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        said.clear()
        if is_seen:
            with pytest.raises(UserError, match="its files have changed"):
                make_loader([source], **BYTES, num_workers=0).load_state_dict(state)
        else:
            resumed(state, [source], **BYTES)
            assert "a continues in epoch 0, after 0 tokens; a file was written to after the save" in said.text
        path.write_bytes(before)


def test_the_content_of_many_files_is_compared_in_about_as_many_blocks_as_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(500):
        (tmp_path / f"{i:03}.txt").write_text(f"{i:03} " * 25_000, encoding="utf-8")  # 6 blocks each
    read: list[int] = []
    add_content = identity._add_content

    def counted(digest: Any, file: Path, size: int, blocks: int) -> None:
        read.append(min(blocks, -(-size // 2**14)))
        add_content(digest, file, size, blocks)

    monkeypatch.setattr(identity, "_add_content", counted)
    before = open_source(DataSource(str(tmp_path)), "data.sources[0]").identity["content"]
    assert len(read) == 500 and sum(read) == 500 * 7
    monkeypatch.setattr(identity, "_BLOCKS", 1000)
    read.clear()
    assert open_source(DataSource(str(tmp_path)), "data.sources[0]").identity["content"] != before
    assert sum(read) == 500 * 2


def test_moved_files_of_a_source_without_a_name_go_on_in_their_order(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for mix_by in ("tokens", "documents"):
        old, new = tmp_path / f"old {mix_by}", tmp_path / f"new {mix_by}"
        old.mkdir()
        for name, texts in (("0", sample_texts(0, 200)), ("1", sample_texts(200, 300))):
            write_jsonl(old / f"{name}.jsonl", texts)
        other = DataSource(str(write_jsonl(tmp_path / "other.jsonl", sample_texts(800, 1000))), weight=0.3)
        straight = make_loader([DataSource(str(old)), other], mix_by=mix_by, **BYTES)
        take(straight, 5)
        state = straight.state_dict()
        expected = take(straight, 60)
        shutil.copytree(old, new)
        said.clear()
        moved = resumed(state, [DataSource(str(new)), other], mix_by=mix_by, **BYTES)
        assert take(moved, 30) == expected[: 30 * 8]
        assert f"data: {new} continues in epoch 0, after " in said.text
        assert f"; the checkpoint calls the same files {old}" in said.text
        again = resumed(moved.state_dict(), [DataSource(str(new)), other], mix_by=mix_by, **BYTES)
        assert take(again, 30) == expected[30 * 8 :]
        assert again.statistics()[f"data/{new}_tokens"] == straight.statistics()[f"data/{old}_tokens"]


def test_a_resume_says_of_every_source_whether_it_goes_on(
    two: list[DataSource], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    loader = make_loader(two, **BYTES)
    take(loader, 2)
    tokens = loader.statistics()["data/a_tokens"]
    other = DataSource(str(write_jsonl(tmp_path / "c.jsonl", sample_texts(300, 400))))
    renamed = dataclasses.replace(two[1], name="begin anew")  # a name is what the user says of a source
    said.clear()
    resumed(loader.state_dict(), [two[0], other, renamed], **BYTES)
    lines = [record.getMessage() for record in said.records if record.getMessage().startswith("data: ")]
    begins = "starts from its beginning: the checkpoint has no source with that"
    assert lines == [
        f"data: a continues in epoch 0, after {tokens:,} tokens",
        f"data: {other.path} {begins} path or content",
        f"data: begin anew {begins} name",
        "data: b is in the checkpoint but not in the job",
    ]


def test_a_state_that_knows_less_of_the_sources_goes_on(two: list[DataSource]) -> None:
    straight = make_loader(two, **BYTES)
    take(straight, 5)
    state = as_saved_before(json.loads(json.dumps(straight.state_dict())))
    assert take(resumed(state, two, **BYTES), 20) == take(straight, 20)


def test_a_place_that_an_earlier_version_saved_leads_to_the_sequences_that_come_next() -> None:
    golden = ROOT / "tests/golden/checkpoint_version_0"
    config = load_config(["--job.config_file", str(golden / "small.toml")])
    state = json.loads((golden / "step-2/train_state.json").read_text(encoding="utf-8"))["data"]
    sources = [dataclasses.replace(config.data.sources[0], path=str(SAMPLE))]
    settings = {"seed": config.debug.seed, "global_batch_size": 2, "tokenizer": str(golden / "step-2/tokenizer")}
    straight = make_loader(sources, **settings)
    take(straight, 2)
    assert state["sequences_seen"] == straight.sequences_seen == 4
    assert take(resumed(state, sources, **settings), 10) == take(straight, 10)
