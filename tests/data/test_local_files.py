"""Files as they occur on real disks: links, folders of parts, leftovers of editors and systems, arrays, byte order
marks."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import sample_texts, write_jsonl, write_parquet

from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.data.local_files import local_files
from titan_peer.data.sources import open_source


def read(path: object) -> list[str]:
    source = open_source(DataSource(str(path)), "data.sources[0]")
    return [r for chunk in range(source.num_chunks) for r in source.records(chunk)]  # type: ignore[misc]


def both_ways(folder: Path) -> list[list[str]]:
    return [read(folder), read(f"{folder}/**/*.jsonl")]


def test_linked_folders_are_followed_by_a_folder_and_by_a_pattern_alike(tmp_path: Path) -> None:
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    (elsewhere / "deep").mkdir(parents=True)
    data.mkdir()
    write_jsonl(elsewhere / "deep/1.jsonl", ["linked"])
    write_jsonl(data / "0.jsonl", ["plain"])
    (data / "link").symlink_to(elsewhere)
    (data / "9.jsonl").symlink_to(elsewhere / "deep/1.jsonl")
    assert both_ways(data) == [["plain", "linked", "linked"]] * 2


def test_a_link_to_a_folder_that_it_lies_in_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    write_jsonl(tmp_path / "a/b/0.jsonl", ["once"])
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/round").symlink_to(".")
    assert both_ways(tmp_path / "a") == [["once"]] * 2
    assert both_ways(tmp_path / "a/round") == [["once"]] * 2
    assert read(f"{tmp_path}/a/*/0.jsonl") == ["once"]
    relative = os.path.relpath(tmp_path / "a")
    assert local_files(DataSource(f"{relative}/**/*.jsonl"), "") == [Path(relative) / "b/0.jsonl"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "0.jsonl", ["plain"])
    (tmp_path / "1.jsonl").symlink_to(tmp_path / "gone")
    for path in (tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(UserError, match=r"1.jsonl: cannot be read: No such file"):
            read(path)


def test_what_systems_and_editors_leave_behind_is_not_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["data"])
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    for hidden in (".ipynb_checkpoints", ".cache/deep"):
        (tmp_path / hidden).mkdir(parents=True)
        write_jsonl(tmp_path / hidden / "a-checkpoint.jsonl", ["old"])
    assert both_ways(tmp_path) == [["data"]] * 2
    assert read(tmp_path / ".cache") == ["old"]  # the path names it
    assert read(tmp_path / ".cache/deep/a-checkpoint.jsonl") == ["old"]


@pytest.mark.parametrize("names", [("part-0.jsonl", "part-1.jsonl"), ("part-00000", "part-00001")])
def test_a_folder_called_like_a_file_is_read_as_its_parts(names: tuple[str, str], tmp_path: Path) -> None:
    parts = tmp_path / "corpus.jsonl"
    parts.mkdir()
    for name, text in zip(names, ("first", "second")):
        write_jsonl(parts / name, [text])
        (parts / f".{name}.crc").write_bytes(b"crc")
    (parts / "_SUCCESS").touch()
    for path in (parts, tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/corpus*"):
        assert read(path) == ["first", "second"]


def test_parts_are_of_the_kind_that_their_folder_names(tmp_path: Path) -> None:
    (tmp_path / "corpus.parquet").mkdir()
    write_parquet(tmp_path / "corpus.parquet/part-00000", ["row"])
    assert read(tmp_path) == ["row"]
    (tmp_path / "loose").mkdir()
    write_jsonl(tmp_path / "loose/part-00000", ["row"])
    with pytest.raises(UserError, match="is not a file, a folder with"):
        read(tmp_path / "loose")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("first", "second"))
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + lines + mark + lines)  # two files joined
    assert read(tmp_path / "a.jsonl") == ["first", "second"] * 2
    (tmp_path / "empty.jsonl").write_bytes(mark + b"\n" + lines)
    assert read(tmp_path / "empty.jsonl") == ["first", "second"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(mark + lines))
    assert read(tmp_path / "a.jsonl.gz") == ["first", "second"]
    (tmp_path / "a.txt").write_bytes(mark + b"text")
    assert read(tmp_path / "a.txt") == ["text"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("records", [[{"text": "one\ntwo"}, {"text": "three"}], {"text": "one\ntwo"}])
def test_json_that_is_not_in_lines_is_named_with_a_command_that_mends_it(
    records: object, indent: int | None, tmp_path: Path
) -> None:
    whole = json.dumps(records, indent=indent)
    if isinstance(records, dict) and indent is None:
        return  # that is a line
    (tmp_path / "a.json").write_text("\ufeff" + whole, encoding="utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(whole.encode()))
    for name in ("a.json", "b.json.gz"):
        with pytest.raises(UserError) as caught:
            open_source(DataSource(str(tmp_path / name), on_bad_document="skip"), "data.sources[0]")
        what = "one JSON array" if isinstance(records, list) else "one JSON object over several lines"
        assert str(caught.value).startswith(
            f"data.sources[0]: {tmp_path / name}: is {what}, but must have one object per line"
        )
    (tmp_path / "a.json").write_text(whole, encoding="utf-8")
    command = str(caught.value).partition("this converts it: ")[2].replace("b.json.gz", "a.json")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, env=environment)
    assert read(tmp_path / "b.jsonl") == ["one\ntwo", "three"][: 1 + isinstance(records, list)]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("3", "a number"),
        ("0.5", "a number"),
        ("true", "the value true"),
        ("null", "null"),
        ("[1]", "a list"),
        ("{}", "an object"),
    ],
)
def test_what_stands_in_place_of_a_text_is_said(value: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=rf"a.jsonl:1: has {word} under text_key = 'text', but must have text there"):
        read(tmp_path / "a.jsonl")


def test_files_come_in_the_order_that_they_had(tmp_path: Path) -> None:
    """A position in the data counts chunks in this order."""
    for name in ("b.jsonl", "a/2.jsonl", "a.jsonl", "a-b/1.jsonl", "a/10.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, sample_texts(0, 1))
    found = local_files(DataSource(str(tmp_path)), "")
    assert found == sorted(p for p in tmp_path.rglob("*") if p.is_file())
