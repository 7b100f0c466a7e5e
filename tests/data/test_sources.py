"""Every format gives the same documents; every bad input is reported with its position, or left out and counted."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corpora import ROOT, make_loader, sample_texts, take, write_jsonl, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_peer.common.errors import TransientError, UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.parse import load_config
from titan_peer.data import hub
from titan_peer.data.records import BadDocument, RecordReader
from titan_peer.data.sources import Source, open_sources

TEXTS = sample_texts(0, 500)


def read(source: Source) -> list[str]:
    """All documents, chunk after chunk, in their order."""
    return [r for chunk in range(source.num_chunks) for r in source.records(chunk)]  # type: ignore[misc]


def opened(path: object, num_streams: int = 4, **settings: Any) -> Source:
    (source,), _ = open_sources([DataSource(str(path), **settings)], "data", num_streams)
    return source


def write_zst(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines.encode())
    return path


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return {
        "jsonl": write_jsonl(folder / "a.jsonl", TEXTS),
        "gz": write_jsonl(folder / "a.jsonl.gz", TEXTS, gzip.open),
        "zst": write_zst(folder / "a.jsonl.zst", TEXTS),
        "parquet": write_parquet(folder / "a.parquet", TEXTS, row_group_size=130),
        "txt": write_texts(folder / "texts", TEXTS),
    }


@pytest.mark.parametrize("num_streams", [1, 4, 8])
@pytest.mark.parametrize("format", ["jsonl", "gz", "zst", "parquet", "txt"])
def test_each_format_gives_every_document_once(format: str, num_streams: int, corpora: dict[str, Path]) -> None:
    source = opened(corpora[format], num_streams)
    assert sorted(read(source)) == sorted(TEXTS)
    if format != "txt":
        assert source.num_chunks >= num_streams
    # and from any place in a chunk
    for chunk in range(0, source.num_chunks, 3):
        whole = list(source.records(chunk))
        for start in range(len(whole) + 2):
            assert list(source.records(chunk, start)) == whole[start:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab\n é"), max_size=40), max_size=20), st.integers(1, 90), st.booleans())
def test_lines_are_cut_into_chunks_at_any_size(texts: list[str], chunk_bytes: int, ends: bool) -> None:
    import tempfile

    from titan_peer.data.formats import JsonLines

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        lines = "\n".join(json.dumps({"text": "x" + t}, ensure_ascii=False) for t in texts)
        path.write_text(lines + "\n" * ends, encoding="utf-8")
        file = JsonLines(path, RecordReader("text", "", 10**6, "data.sources[0]"))
        file.chunk_bytes = chunk_bytes
        found = [r for chunk in range(file.num_chunks) for r in file.records(chunk, 0)]
        assert found == ["x" + t for t in texts]


def test_a_glob_and_a_folder_mean_the_files_in_order(corpora: dict[str, Path]) -> None:
    folder = corpora["txt"]
    assert read(opened(folder)) == read(opened(f"{folder}/*.txt")) == TEXTS


def test_a_template_makes_the_document_from_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["first", "second"])
    assert read(opened(path, template="No. {{ number }}: {{ text }}")) == ["No. 0: first", "No. 1: second"]
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    assert read(opened(tmp_path / "chat.jsonl", template=template)) == ["<user>Hello\n<assistant>Good day\n"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text ", "data.sources[0].template: is not a valid Jinja template"),
        ("nothing", "data.sources[0].template = 'nothing': uses no column"),
        ("{{ title }}", "a.jsonl:1: does not fit the template: 'title' is undefined"),
        ("{{ text.__class__.__mro__ }}", "a.jsonl:1: does not fit the template: access to attribute '__class__'"),
    ],
)
def test_a_bad_template_is_named(template: str, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UserError) as caught:
        opened(path, template=template)
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# bad input

GOOD = json.dumps({"text": "a good document"}).encode() + b"\n"


def bad_jsonl(folder: Path, content: bytes) -> Path:
    (folder / "a.jsonl").write_bytes(GOOD * 3 + content + GOOD * 2)
    return folder / "a.jsonl"


def cut_off_gzip(folder: Path) -> Path:
    path = write_jsonl(folder / "a.jsonl.gz", TEXTS, gzip.open)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def cut_off_zst(folder: Path) -> Path:
    path = write_zst(folder / "a.jsonl.zst", TEXTS)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def cut_off_parquet(folder: Path) -> Path:
    write_parquet(folder / "b.parquet", TEXTS)
    (folder / "a.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-2000])
    return folder


def damaged_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "a.parquet", TEXTS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    return path


def text_in_latin_1(folder: Path) -> Path:
    (folder / "a.txt").write_bytes("café au lait".encode("latin-1"))
    (folder / "b.txt").write_text("good", encoding="utf-8")
    return folder


CASES: dict[str, tuple[Any, str]] = {
    "broken line": (lambda f: bad_jsonl(f, b'{"text": "cut off\n'), "a.jsonl:4: is not JSON"),
    "no object": (lambda f: bad_jsonl(f, b"[1, 2]\n"), "a.jsonl:4: is not a JSON object but list"),
    "missing key": (
        lambda f: bad_jsonl(f, b'{"content": "x", "id": 1}\n'),
        "a.jsonl:4: has no text under text_key = 'text'; its keys: 'content', 'id'",
    ),
    "no text": (
        lambda f: bad_jsonl(f, b'{"text": 3}\n'),
        "a.jsonl:4: has a number under text_key = 'text', but must have text there",
    ),
    "empty": (lambda f: bad_jsonl(f, b'{"text": " "}\n'), "a.jsonl:4: is an empty document"),
    "encoding": (lambda f: bad_jsonl(f, b'{"text": "caf\xe9"}\n'), "a.jsonl:4: is not UTF-8"),
    "half a character": (lambda f: bad_jsonl(f, b'{"text": "\\ud800"}\n'), "a.jsonl:4: is not valid Unicode"),
    "nested": (lambda f: bad_jsonl(f, b"[" * 100_000 + b"\n"), "a.jsonl:4: is n"),
    "huge line": (
        lambda f: bad_jsonl(f, b'{"text": "' + b"x" * 50 * 2**20 + b'"}\n'),
        "a.jsonl:4: is a document of 52,428,813 bytes, more than max_document_bytes = 33,554,432",
    ),
    "gzip cut off": (cut_off_gzip, "the file is damaged or cut off from here on: Compressed file ended"),
    "zstd cut off": (cut_off_zst, "the file is damaged or cut off from here on: Truncated"),
    "parquet cut off": (cut_off_parquet, "a.parquet: is not a complete Parquet file"),
    "parquet damaged": (damaged_parquet, "the row group is damaged from here on"),
    "text encoding": (text_in_latin_1, "a.txt: is not UTF-8"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_with_its_place_or_left_out_and_counted(case: str, tmp_path: Path) -> None:
    make, message = CASES[case]
    path = make(tmp_path)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        take(make_loader([DataSource(str(path), max_epochs=1)], num_streams=2), 200)
    assert message in str(caught.value)
    assert str(caught.value).startswith("data.sources[0]: ")
    assert 'data.sources[0].on_bad_document = "skip" leaves such documents out' in str(caught.value)

    source = DataSource(str(path), name="a", max_epochs=1, on_bad_document="skip")
    loader = make_loader([source], num_streams=2)
    take(loader, 200)
    statistics = loader.statistics()
    assert statistics["data/a_skipped"] >= 1 and statistics["data/a_tokens"] > 0
    if path.suffix == ".jsonl":
        assert statistics["data/a_skipped"] == 1
        assert len(read(opened(path, on_bad_document="skip"))) == 6
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("content", "policy", "message"),
    [
        (b"", "error", "it has no documents"),
        (b"\n\n", "error", "it has no documents"),
        (b'{"text": ""}\n' * 5, "skip", "all its documents are bad, the first is"),
    ],
)
def test_a_source_without_documents_is_refused(content: bytes, policy: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"data.sources\[0\].path = .*a.jsonl: {message}"):
        make_loader([DataSource(str(tmp_path / "a.jsonl"), on_bad_document=policy)])


def test_a_source_with_fewer_documents_than_streams_is_read_by_all_streams(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    for shuffle in (True, False):
        loader = make_loader([DataSource(str(path))], num_streams=8, shuffle=shuffle, seq_len=8, tokenizer="byte")
        assert all(next(loader)["num_bytes"] > 0 for _ in range(5))


def test_a_misspelt_file_of_a_folder_that_is_here_is_not_looked_for_in_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mydata").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data.sources\[0\].path = mydata/mine.jsnl: is not a file, a folder with"):
        opened(Path("mydata/mine.jsnl"))


def test_suffixes_in_capitals_are_known(tmp_path: Path) -> None:
    (tmp_path / "NOTES.TXT").write_text("in capitals", encoding="utf-8")
    write_jsonl(tmp_path / "B.JSONL", ["a line"])
    assert sorted(read(opened(tmp_path))) == ["a line", "in capitals"]


@pytest.mark.parametrize("make", [lambda f: f / "none.jsonl", lambda f: f / "*.jsonl", lambda f: f])
def test_no_matching_file_is_named(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.sources\[0\].path = .*: is not a file, a folder with .jsonl"):
        opened(make(tmp_path))


def test_an_unknown_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"suffix of a.csv is not one of .jsonl"):
        opened(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("weight = -1.0", "data.sources[0].weight = -1.0: must not be negative"),
        ("weight = nan", "data.sources[0].weight = nan: must be a number"),
        ("weight = 0.0", "data.sources: all weights are 0; at least one must be positive"),
        ("max_epochs = -1", "data.sources[0].max_epochs = -1: must not be negative"),
        ('at_end = "stop"', "data.sources[0].at_end = 'stop': needs max_epochs"),
        ('on_bad_document = "ignore"', "data.sources[0].on_bad_document = 'ignore': must be one of 'error', 'skip'"),
        ("weigth = 1.0", "unknown key data.sources[0].weigth = 1.0; did you mean weight?"),
    ],
)
def test_impossible_keys_of_a_source_are_named(keys: str, message: str, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(f'[[data.sources]]\npath = "a.jsonl"\n{keys}\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(["--job.config_file", str(job)])
    assert message in str(caught.value)


def test_two_sources_of_one_name_are_refused(corpora: dict[str, Path]) -> None:
    path = str(corpora["jsonl"])
    with pytest.raises(UserError, match=r"data.sources\[1\].name = .*: is already the name of sources\[0\]"):
        open_sources([DataSource(path), DataSource(path)], "data")


# --------------------------------------------------------------------------------------------------------------------
# Hugging Face datasets: the library itself, on a dataset on disk


@pytest.fixture(scope="module")
def hub_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "dataset"
    folder.mkdir()
    for i in range(5):
        write_parquet(folder / f"train-{i:05}-of-00005.parquet", TEXTS[i * 100 : i * 100 + 100], row_group_size=30)
    return folder


def hub_source(path: Path, streaming: bool, reader: RecordReader | None = None) -> Source:
    reader = reader or RecordReader("text", "", 10**6, "data.sources[0]")
    source = Source.__new__(Source)
    source.config, source.key, source.name, source.seed = DataSource(str(path)), "data.sources[0]", "hub", 0
    source.parts = hub.open_dataset(str(path), "", "train", streaming, reader, "data.sources[0]", 2)
    return source


@pytest.mark.parametrize("num_streams", [1, 2, 8])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_hugging_face_dataset_gives_every_document_once(
    streaming: bool, num_streams: int, hub_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    source = hub_source(hub_dataset, streaming)
    source.divide(num_streams)
    assert source.num_chunks >= num_streams
    assert sorted(read(source)) == sorted(TEXTS)
    for chunk in range(source.num_chunks)[:3]:
        whole = list(source.records(chunk))
        assert list(source.records(chunk, 7)) == whole[7:]


def test_a_missing_column_of_a_hugging_face_dataset_is_named(hub_dataset: Path) -> None:
    reader = RecordReader("content", "", 10**6, "data.sources[0]")
    with pytest.raises(UserError, match=r"data.sources\[0\]: .* has no column 'content'; its columns: text, number"):
        hub_source(hub_dataset, True, reader)


def test_a_network_that_fails_is_tried_again_where_it_was_and_said(
    hub_dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    source = hub_source(hub_dataset, True)
    source.divide(1)
    failures = iter([True, True, False, False, True, False, False])
    real = datasets.IterableDataset.iter

    def fails_at_times(self: Any, batch_size: int, drop_last_batch: bool = False) -> Iterator[Any]:
        for table in real(self, batch_size=30):
            if next(failures, False):
                raise ConnectionError("reset by peer")
            yield table

    monkeypatch.setattr(datasets.IterableDataset, "iter", fails_at_times)
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.01)
    logger = logging.getLogger("titan_peer")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "titan_peer"):
        assert read(source) == TEXTS
    assert "shard 0: failed (ConnectionError: reset by peer); try 2 of 3 in 0.01 s" in caplog.text

    failures = iter([True] * 100)
    with pytest.raises(TransientError, match=r"shard 0: cannot be read: ConnectionError: reset by peer"):
        read(source)


def test_other_errors_are_not_tried_again() -> None:
    tries = []

    def request() -> None:
        tries.append(1)
        raise FileNotFoundError("no such dataset")

    with pytest.raises(FileNotFoundError):
        hub.with_retries(request, "opening", 5)
    assert len(tries) == 1


def test_a_dataset_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "FIRST_PAUSE", 1000.0)  # offline by the user's own setting: no attempt can help
    with pytest.raises(UserError) as caught:
        open_sources([DataSource("nobody/nothing", subset="en")], "data")
    message = (
        "data.sources[0].path = nobody/nothing (subset en, split train): is not a local file or folder, and cannot"
    )
    assert str(caught.value).startswith(message)


def test_the_ready_mixes_name_datasets_and_parse() -> None:
    mixes = [load_config(["--job.config_file", str(p)]) for p in sorted((ROOT / "train_configs").glob("*.toml"))]
    ids = {source.path for config in mixes for source in config.data.sources}
    assert {"allenai/c4", "HuggingFaceFW/fineweb-edu", "codeparrot/codeparrot-clean"} <= ids


def test_a_bad_document_says_where_and_why() -> None:
    assert str(BadDocument("a.jsonl:3", "is empty")) == "a.jsonl:3: is empty"


@pytest.mark.slow
def test_a_line_of_50_megabytes_is_read_when_it_is_allowed(tmp_path: Path) -> None:
    words = " ".join(" ".join(TEXTS).split())
    text = (words * (50 * 2**20 // len(words) + 1))[: 50 * 2**20]
    path = write_jsonl(tmp_path / "a.jsonl", [text, "x" * 50 * 2**20])
    source = DataSource(str(path), name="a", max_document_bytes=2**27, max_epochs=1)
    loader = make_loader([source], num_streams=1, seq_len=4096, global_batch_size=64, shuffle=False)
    start = time.monotonic()
    counted = 0.0
    while (batch := next(loader))["num_bytes"]:
        counted += batch["num_bytes"].item()
    assert counted == pytest.approx(len(text.encode()) + 50 * 2**20)
    assert time.monotonic() - start < 300
