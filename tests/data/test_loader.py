"""Batches are the same after a resume in a new process, on any number of processes and workers."""

from __future__ import annotations

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import SAMPLE, TOKENIZER, make_loader, sample_texts, take, three_sources, write_jsonl
from reader_processes import continue_loader, in_new_processes, run_rank

from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.data.loader import _reader_states, build_validation_dataloader, merge_streams
from titan_peer.data.records import RecordReader
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.ops.cross_entropy import IGNORE_INDEX


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_sources", [1, 3])
def test_resume_in_a_new_process_repeats_the_next_50_batches(
    num_sources: int, shuffle: bool, workers: int, packing: str, tmp_path: Path
) -> None:
    sources = three_sources(tmp_path)[:num_sources]
    settings = {"shuffle": shuffle, "num_workers": workers, "packing": packing, "shuffle_buffer_size": 50}
    stop = random.randrange(1, 60)
    straight = make_loader(sources, **settings)
    take(straight, stop)
    expected = take(straight, 50)
    assert len(set(expected)) > 300  # of 400, some from a second epoch: a loader that repeats one batch would fail
    in_new_processes(continue_loader, tmp_path, sources, settings, stop)
    in_new_processes(continue_loader, tmp_path, sources, settings, 50)
    assert json.loads((tmp_path / "digests.json").read_text(encoding="utf-8")) == expected, (
        f"stopped after {stop} batches"
    )


def test_documents_are_resumed_exactly_too_when_drawn_by_documents(tmp_path: Path) -> None:
    for packing in ("concat", "best_fit"):
        settings = {"mix_by": "documents", "packing": packing}
        sources = three_sources(tmp_path / packing if (tmp_path / packing).mkdir() is None else tmp_path)
        straight = make_loader(sources, **settings)
        take(straight, 13)
        resumed = make_loader(sources, **settings)
        resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
        assert take(straight, 20) == take(resumed, 20)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_one_then_two_then_four_then_one_process_read_the_same_sequences_in_the_same_order(
    packing: str, tmp_path: Path
) -> None:
    sources = three_sources(tmp_path)
    straight = make_loader(sources, packing=packing)
    expected = take(straight, 20)
    found: list[str] = []
    for part, world in enumerate((1, 2, 4, 1)):
        (tmp_path / "store").unlink(missing_ok=True)
        in_new_processes(run_rank, world, tmp_path, sources, packing, 5, count=world)
        ranks = [json.loads((tmp_path / f"digests.{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
        found += [ranks[i % world][i // world] for i in range(40)]  # sequences are dealt to ranks in turn
        assert found == expected[: 40 * (part + 1)], f"on {world} processes"
    assert json.loads((tmp_path / "statistics.json").read_text(encoding="utf-8")) == straight.statistics()


def test_streams_that_are_read_several_times_are_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", sample_texts(0, 200))
    caplog.set_level("INFO", "titan_peer")
    logging.getLogger("titan_peer").propagate = True
    make_loader([DataSource(str(SAMPLE)), DataSource(str(few), name="few")], world=4)
    said = "data.num_streams = 2 (the most that few has documents for) is not a multiple of processes x data.num_workers = 4"
    assert said in caplog.text
    caplog.clear()
    make_loader([DataSource(str(SAMPLE))], world=4)
    assert not caplog.text


def test_each_of_16_processes_reads_streams_of_its_own(tmp_path: Path) -> None:
    settings = {"global_batch_size": 32, "tokenizer": "byte"}
    alone = make_loader([DataSource(str(SAMPLE))], num_streams=16, **settings)
    expected = take(alone, 2)
    for rank in (0, 5, 15):
        loader = make_loader([DataSource(str(SAMPLE))], rank=rank, world=16, **settings)
        assert loader.pipeline.num_streams == 16
        assert take(loader, 2) == expected[rank::16]
        (read,) = _reader_states(loader._loader)
        assert list(read) == [str(rank)]
    few = DataSource(str(write_jsonl(tmp_path / "few.jsonl", sample_texts(0, 600))))
    assert make_loader([few], world=16, **settings).pipeline.num_streams == 8


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (1, 3), (2, 2), (3, 0), (8, 0), (12, 0)])
def test_sequences_do_not_depend_on_processes_or_workers(world: int, workers: int, tmp_path: Path) -> None:
    sources = three_sources(tmp_path)
    batch = 24
    straight = make_loader(sources, global_batch_size=batch)
    expected = take(straight, 4)
    loaders = [
        make_loader(sources, rank=r, world=world, num_workers=workers, global_batch_size=batch) for r in range(world)
    ]
    ranks = [take(loader, 2) for loader in loaders]
    assert [ranks[i % world][i // world] for i in range(2 * batch)] == expected[: 2 * batch]
    # as the collective in state_dict does, without processes
    for loader in loaders:
        loader.dp_world_size = 1
    states = [loader.state_dict() for loader in loaders]
    state = {**states[0], "streams": merge_streams([s["streams"] for s in states])}
    resumed = make_loader(sources, global_batch_size=batch)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert take(resumed, 2) == expected[2 * batch :]


def test_a_batch_is_what_the_model_takes() -> None:
    # with a name, because an order that follows the path would depend on the location of the clone
    batch = next(make_loader([DataSource(str(SAMPLE), name="sample")], seq_len=256))
    tokens, labels, documents = batch["tokens"], batch["labels"], batch["document_ids"]
    assert tokens.shape == labels.shape == documents.shape == (8, 256)
    assert tokens.dtype == labels.dtype == torch.int64 and documents.dtype == torch.int32
    same = documents[:, 1:] == documents[:, :-1]
    assert torch.equal(labels[:, :-1][same], tokens[:, 1:][same])
    assert (labels[:, :-1][~same] == IGNORE_INDEX).all() and (~same).sum() > 0


def test_bits_per_byte_counts_the_bytes_of_the_text() -> None:
    source = DataSource(str(SAMPLE), max_epochs=1)
    text_bytes = sum(len(text.encode()) for text in sample_texts())
    for packing in ("concat", "best_fit", "pad"):
        loader = make_loader([source], packing=packing, seq_len=512)
        counted = 0.0
        while (batch := next(loader))["num_bytes"]:
            counted += batch["num_bytes"].item()
        assert counted == pytest.approx(text_bytes, rel=1e-9)


def test_a_seed_gives_one_order_and_another_seed_another(tmp_path: Path) -> None:
    sources = three_sources(tmp_path)
    first, again = make_loader(sources, seed=3), make_loader(sources, seed=3)
    other = make_loader(sources, seed=4)
    taken = take(first, 5)
    assert taken == take(again, 5)
    assert len(set(taken) & set(take(other, 5))) < 20  # of 40: an early part of a long document may come early again


def test_the_order_follows_the_name_and_without_one_the_path(tmp_path: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{place}.jsonl", sample_texts(0, 300))) for place in ("here", "elsewhere")]
    here, elsewhere = (take(make_loader([DataSource(path, name="text")]), 4) for path in paths)
    assert here == elsewhere
    here, elsewhere = (take(make_loader([DataSource(path)]), 4) for path in paths)
    assert here != elsewhere


def test_state_stays_small_however_much_was_read(tmp_path: Path) -> None:
    loader = make_loader(three_sources(tmp_path), packing="best_fit")
    take(loader, 1)
    early = len(json.dumps(loader.state_dict()))
    take(loader, 300)
    assert len(json.dumps(loader.state_dict())) < early + 600 < 10_000


def test_resume_with_another_sequence_length_and_batch_goes_on_at_the_next_token() -> None:
    source = DataSource(str(SAMPLE), max_epochs=1)

    def tokens(loader: Any, batches: int) -> list[int]:
        taken = [next(loader) for _ in range(batches)]
        return [t for b in taken for row, ids in zip(b["tokens"], b["labels"]) for t in row.tolist()]

    straight = make_loader([source], num_streams=1, shuffle=False)
    expected = tokens(straight, 20)
    first = make_loader([source], num_streams=1, shuffle=False)
    found = tokens(first, 3)
    second = make_loader([source], num_streams=1, shuffle=False, seq_len=96, global_batch_size=6)
    second.load_state_dict(first.state_dict())
    found += tokens(second, 9)
    assert found == expected[: len(found)]


def test_resume_with_a_new_source_and_weights_keeps_the_place_in_the_old_ones(tmp_path: Path) -> None:
    a, b, c = three_sources(tmp_path)
    first = make_loader([a, b])
    seen = set(take(first, 10))
    second = make_loader([a, b, c], shuffle=True)
    second.load_state_dict(first.state_dict())
    assert not seen & set(take(second, 10))
    statistics = second.statistics()
    assert statistics["data/c_tokens"] > 0
    assert statistics["data/a_tokens"] > first.statistics()["data/a_tokens"]


def test_counts_of_a_source_go_on_from_where_they_were(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", sample_texts(0, 40))
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:20], "{broken", *lines[20:]]) + "\n", encoding="utf-8")
    source = DataSource(str(file), name="a", on_bad_document="skip")
    first = make_loader([source], num_streams=2, seq_len=64)
    while first.statistics()["data/a_epoch"] < 2:
        take(first, 1)
    before = first.statistics()
    assert before["data/a_skipped"] >= 2  # the same line in each pass
    second = make_loader([source], num_streams=2, seq_len=64)
    second.load_state_dict(first.state_dict())
    assert second.statistics() == before
    take(first, 30)
    take(second, 30)
    assert second.statistics() == first.statistics()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": "pad"}, "data.packing = 'pad': the checkpoint was made with 'concat'"),
        ({"mix_by": "documents"}, "data.mix_by = 'documents': the checkpoint was made with 'tokens'"),
        ({"num_streams": 4}, "data.num_streams = 4: the checkpoint was made with 8"),
    ],
)
def test_a_place_that_would_mean_nothing_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = make_loader([DataSource(str(SAMPLE))]).state_dict()
    with pytest.raises(UserError, match=message):
        make_loader([DataSource(str(SAMPLE))], **change).load_state_dict(state)


def test_files_that_changed_since_the_checkpoint_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", sample_texts(0, 300))
    state = make_loader([DataSource(str(file))]).state_dict()
    write_jsonl(file, sample_texts(0, 301))
    with pytest.raises(UserError, match=r"data.sources\[0\].path = .*a.jsonl: its files have changed"):
        make_loader([DataSource(str(file))]).load_state_dict(state)


def test_at_the_end_of_all_sources_batches_are_padding() -> None:
    loader = make_loader([DataSource(str(SAMPLE), max_epochs=1)], seq_len=512, global_batch_size=64)
    learnt = [(next(loader)["labels"] != IGNORE_INDEX).sum().item() for _ in range(40)]
    assert learnt[0] > 0 and learnt[-3:] == [0, 0, 0]


def test_an_error_in_a_worker_arrives_as_the_same_message(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", sample_texts(0, 200))
    file.write_bytes(file.read_bytes() + b"not json\n")
    for workers in (0, 2):
        loader = make_loader([DataSource(str(file))], num_workers=workers, shuffle=False)
        with pytest.raises(UserError) as caught:
            take(loader, 500)
        assert str(caught.value).startswith(f"data.sources[0]: {file}:201: is not JSON")
        assert "Traceback" not in str(caught.value)


def held_out(sources: list[DataSource], rank: int = 0, world: int = 1) -> Any:
    return build_validation_dataloader(
        sources=sources,
        tokenizer=load_tokenizer(TOKENIZER),
        seq_len=64,
        local_batch_size=4,
        dp_rank=rank,
        dp_world_size=world,
    )


def test_every_validation_set_is_read_once_and_whole_by_all_processes_together(tmp_path: Path) -> None:
    sources = three_sources(tmp_path)[:2]
    tokenizer = load_tokenizer(TOKENIZER)
    loaders = [held_out(sources, rank, 3) for rank in range(3)]
    for name, texts in (("a", sample_texts(0, 700)), ("b", sample_texts(700, 1300))):
        batches = [list(loader.sets[name]) for loader in loaders]
        assert len({len(b) for b in batches}) == 1
        learnt = sum((b["labels"] != IGNORE_INDEX).sum().item() for b in itertools.chain(*batches))
        assert learnt == sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))  # begin and end, less the first
        repeated = list(loaders[0].sets[name])
        assert all(np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(batches[0], repeated, strict=True))


def test_a_validation_that_stops_early_goes_on_with_the_whole_set_next_time() -> None:
    loader = held_out([DataSource(str(ROOT_VALIDATION))])
    (data,) = loader.sets.values()
    first = list(itertools.islice(data, 2))
    whole = list(data)
    assert len(whole) > 2 and all(torch.equal(x["tokens"], y["tokens"]) for x, y in zip(first, whole))


ROOT_VALIDATION = SAMPLE.with_name("validation.jsonl")


def test_a_resume_reads_one_window_a_stream_not_what_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataSource(str(write_jsonl(tmp_path / "a.jsonl", sample_texts() * 3)))
    settings = {"shuffle_buffer_size": 20, "num_streams": 4}
    straight = make_loader([source], **settings)
    take(straight, 1500)  # three quarters of 7,332 documents
    state = straight.state_dict()
    read: list[int] = []
    from_json = RecordReader.from_json
    monkeypatch.setattr(RecordReader, "from_json", lambda *a: read.append(1) or from_json(*a))
    resumed = make_loader([source], **settings)
    resumed.load_state_dict(state)
    assert take(resumed, 1) == take(straight, 1)
    assert len(read) < 4 * 20 * 4
