"""titan-peer data inspect, tokenize and train-tokenizer, called as a user would."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import ROOT, SAMPLE, TOKENIZER, make_loader, sample_texts, take, tokenizer_with_a_gap, write_jsonl

from titan_peer.analysis.dry_run import resolve
from titan_peer.commands import main as cli
from titan_peer.common.errors import UserError
from titan_peer.common.folder_lock import NAME as LOCK
from titan_peer.config.data_source import DataSource
from titan_peer.config.parse import load_config
from titan_peer.data.records import TokenizedText
from titan_peer.data.tokenized import TokenizedShard, open_shards, write_shard
from titan_peer.data.tokenizer import load_tokenizer

DEBUG = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--model.tokenizer_path", TOKENIZER]


def tokenize(output: Path, *arguments: str, source: Path = SAMPLE) -> int:
    words = ["--source.path", str(source), "--tokenizer_path", TOKENIZER, "--output", str(output), *arguments]
    return cli.main(["data", "tokenize", *words])


def test_tokenized_documents_are_what_the_tokenizer_makes_of_the_text(tmp_path: Path) -> None:
    assert tokenize(tmp_path, "--tokens_per_shard", "100000") == 0
    shards = open_shards(tmp_path, "data.sources[0]")
    assert len(shards) > 2
    found = [record for shard in shards for c in range(shard.num_chunks) for record in shard.records(c, 0)]
    texts = sample_texts()
    assert [d.ids.tolist() for d in found] == load_tokenizer(TOKENIZER).encode_batch(texts)
    assert [d.num_bytes for d in found] == [len(t.encode()) for t in texts]
    assert isinstance(shards[0], TokenizedShard) and shards[0].tokens.dtype == np.uint16


def test_a_job_reads_tokens_as_it_reads_the_text(tmp_path: Path) -> None:
    tokenize(tmp_path)
    settings = {"shuffle": False, "num_streams": 1}
    assert take(make_loader([DataSource(str(tmp_path))], **settings), 40) == take(
        make_loader([DataSource(str(SAMPLE))], **settings), 40
    )


def test_tokenizing_that_was_killed_is_refused_then_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    source = write_jsonl(tmp_path / "a.jsonl", sample_texts() * 4)
    settings = ["--tokens_per_shard", "100000"]
    tokenize(whole, *settings, source=source)
    command = [
        sys.executable,
        "-m",
        "titan_peer.commands.main",
        "data",
        "tokenize",
        "--source.path",
        str(source),
        *settings,
    ]
    process = subprocess.Popen([*command, "--tokenizer_path", TOKENIZER, "--output", str(killed)])
    deadline = time.monotonic() + 400
    while not (killed / "shard-00002.tokens").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = len(json.loads((killed / "tokenized.json").read_text(encoding="utf-8"))["shards"])
    assert made < len(json.loads((whole / "tokenized.json").read_text(encoding="utf-8"))["shards"])
    job = ["data", "inspect", *DEBUG, "--data.sources.0.path", str(killed)]
    assert cli.main(job) == 2
    assert "tokenising was interrupted; repeat the `titan-peer data tokenize` command" in capsys.readouterr().err

    written = {p.name: p.stat().st_mtime_ns for p in killed.glob(f"shard-{made - 1:05}*")}
    tokenize(killed, *settings, source=source)
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes()
    assert {p.name: p.stat().st_mtime_ns for p in killed.glob(f"shard-{made - 1:05}*")} == written


def test_two_at_once_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, source = tmp_path / "tokens", write_jsonl(tmp_path / "a.jsonl", sample_texts())
    program = f"""
import sys, time
from titan_peer.commands import main as cli
from titan_peer.data import pretokenize
whole = pretokenize.Tokenization._close
def close(self, *args):
    whole(self, *args)
    print("a shard is there", flush=True)
    sys.stdin.readline()
pretokenize.Tokenization._close = close
sys.exit(cli.main(["data", "tokenize", "--source.path", {str(source)!r}, "--output", {str(folder)!r},
    "--tokenizer_path", "byte", "--tokens_per_shard", "1000000000"]))
"""
    first = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"a shard is there\n"
        before = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
        assert tokenize(folder, "--tokenizer_path", "byte", source=source) == 2
        said = capsys.readouterr().err
        assert re.search(
            rf"error: --output = {folder}: process {first.pid} on .* is writing to it; wait until it has", said
        )
        assert {path.name: path.read_bytes() for path in folder.glob("[!.]*")} == before
    finally:
        first.communicate(b"\n", timeout=60)
    assert first.returncode == 0
    assert tokenize(folder, "--tokenizer_path", "byte", source=source) == 0


class Killed(BaseException):
    """Ends the command immediately, like a signal that cannot be caught."""


def kill_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the `moment`-th write or rename be the last one, with the file half written; returns the list of changes
    made."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def last(what: str) -> bool:
        done.append(what)
        return len(done) == moment

    def half_written(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().name == LOCK:  # of the folder, at any time
            fsync(file)
            return
        if last("write"):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise Killed
        fsync(file)

    def not_renamed(source: Path, target: Path) -> None:
        if last("rename"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "fsync", half_written)
    monkeypatch.setattr(os, "replace", not_renamed)
    return done


def test_tokenizing_killed_at_any_write_and_begun_again_makes_the_same_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(3 * 512 + 9)])
    settings = ["--tokens_per_shard", "1", "--tokenizer_path", "byte"]  # a shard per 512 texts
    with monkeypatch.context() as patch:
        moments = kill_at(0, patch)
        assert tokenize(tmp_path / "whole", *settings, source=source) == 0
    assert len(moments) == 4 * 5 + 2  # three files of a shard and the manifest, which is renamed, and it at the end
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.name != LOCK}
    for moment in range(1, len(moments) + 1):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            kill_at(moment, patch)
            with pytest.raises(Killed):
                tokenize(folder, *settings, source=source)
        manifest = folder / "tokenized.json"
        made = json.loads(manifest.read_text(encoding="utf-8"))["shards"] if manifest.exists() else []
        kept = {file: file.stat().st_mtime_ns for shard in made for file in folder.glob(f"{shard['name']}.*")}
        assert len(kept) == 3 * ((moment - 1) // 5 if moment <= 20 else 4)
        assert tokenize(folder, *settings, source=source) == 0
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}
        assert found.pop(LOCK) == b""  # that no process has
        assert found == whole
        assert {file: file.stat().st_mtime_ns for file in kept} == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source.text_key", "body"], "holds shards made with source.text_key = 'text', not 'body'"),
        (["--source.template", "{{ body }}"], "holds shards made with source.template = 'another key', not"),
        (
            ["--source.max_document_bytes", "99"],
            "holds shards made with source.max_document_bytes = 33554432, not 99",
        ),
        (
            ["--source.on_bad_document", "error"],
            "holds shards made with source.on_bad_document = 'skip', not 'error'",
        ),
    ],
)
def test_another_reading_into_a_finished_folder_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "a.jsonl"
    record = json.dumps({"text": "one text", "body": "another"}) + "\n"
    source.write_text(record * 3 + "broken\n", encoding="utf-8")
    skip = ["--source.on_bad_document", "skip"]
    assert tokenize(tmp_path / "out", *skip, source=source) == 0
    assert tokenize(tmp_path / "out", *skip, source=source) == 0
    capsys.readouterr()
    assert tokenize(tmp_path / "out", *skip, *arguments, source=source) == 2
    assert message in capsys.readouterr().err
    source.write_text(source.read_text(encoding="utf-8").replace("another", "changed"), encoding="utf-8")
    assert tokenize(tmp_path / "out", *skip, source=source) == 2
    assert "holds shards made with another source, or with one that has changed since" in capsys.readouterr().err


def test_a_folder_of_a_version_that_did_not_keep_the_reading_is_used_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("titan_peer"), "propagate", True)
    source = write_jsonl(tmp_path / "a.jsonl", ["one text"])
    tokenize(tmp_path / "out", source=source)
    manifest = tmp_path / "out/tokenized.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["source"] = {key: content["source"][key] for key in ("path", "fingerprint")}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert tokenize(tmp_path / "out", source=source) == 0
    assert "by a version that did not store how the files were read" in caplog.text
    copy = write_jsonl(tmp_path / "b.jsonl", ["one text"])
    assert tokenize(tmp_path / "out", source=copy) == 2


def test_ids_beyond_the_number_of_entries_are_stored_as_they_are(tmp_path: Path) -> None:
    tokenizer = tokenizer_with_a_gap(tmp_path / "tokenizer", 70_000)
    source = write_jsonl(tmp_path / "a.jsonl", ["thanks giving"])
    assert tokenize(tmp_path / "out", "--tokenizer_path", str(tokenizer), source=source) == 0
    (document,) = open_shards(tmp_path / "out", "data.sources[0]")[0].records(0, 0)
    assert document.ids.tolist() == load_tokenizer(str(tokenizer)).encode_batch(["thanks giving"])[0]
    assert document.ids[-1] == 70_000


def test_an_id_that_does_not_fit_is_never_written(tmp_path: Path) -> None:
    for ids in ([1, 70_000], [-1]):
        with pytest.raises(UserError, match=f"gave the ids {min(ids)} to {max(ids)}, which do not fit into uint16"):
            write_shard(tmp_path, "shard-00000", [TokenizedText(np.array(ids, np.int32), 5)], "uint16")


def test_shards_with_ids_that_the_tokenizer_lacks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One whose ids were cut to 16 bits when it was written, and one with a damaged number."""
    tokenizer = tokenizer_with_a_gap(tmp_path / "tokenizer", 70_000)
    source = write_jsonl(tmp_path / "a.jsonl", ["thanks giving"])
    arguments = ["--tokenizer_path", str(tokenizer)]
    assert tokenize(tmp_path / "out", *arguments, source=source) == 0
    shard, manifest = tmp_path / "out/shard-00000.tokens", tmp_path / "out/tokenized.json"
    ids = np.fromfile(shard, np.uint32)
    np.append(ids[:-1], 70_001).astype(np.uint32).tofile(shard)
    with pytest.raises(UserError, match=r"shard-00000.tokens: document 0: is damaged: it has the id 70,001"):
        take(make_loader([DataSource(str(tmp_path / "out"))], tokenizer=str(tokenizer)), 1)

    ids.astype(np.uint16).tofile(shard)
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("uint32", "uint16"), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"holds ids as uint16, but the tokenizer has ids up to 70,000: tokenise it again"
    ):
        make_loader([DataSource(str(tmp_path / "out"))], tokenizer=str(tokenizer))
    assert tokenize(tmp_path / "out", *arguments, source=source) == 2
    assert "holds shards made with numbers too small for the tokenizer's ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer_path", "byte"], "holds shards made with another tokenizer"),
        (["--source.path", str(SAMPLE.with_name("validation.jsonl"))], "holds shards made with another source"),
        (["--tokens_per_shard", "0"], "--tokens_per_shard 0: must be at least 1"),
        (["--source.path", ""], "--source.path: must be given"),
    ],
)
def test_what_cannot_be_tokenized_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenize(tmp_path)
    assert tokenize(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_damaged_shards_and_other_tokenizers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenize(tmp_path)
    job = ["data", "inspect", *DEBUG, "--data.sources.0.path", str(tmp_path), "--output", str(tmp_path / "out")]
    assert cli.main([*job, "--model.tokenizer_path", "byte"]) == 2
    assert "was tokenised with another tokenizer than model.tokenizer_path" in capsys.readouterr().err
    tokens = tmp_path / "shard-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-1000])
    assert cli.main(job) == 2
    assert "shard-00000.tokens: is damaged: it has 586,175 tokens, not 586,675" in capsys.readouterr().err


def test_inspect_shows_sequences_shares_and_a_histogram(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = ["data", "inspect", *DEBUG, "--data.sources.0.path", str(SAMPLE), "--output", str(tmp_path)]
    assert cli.main([*job, "--sequences", "3", "--data.shuffle", "false", "--data.num_streams", "1"]) == 0
    shown = capsys.readouterr().out
    first = sample_texts(0, 1)[0]
    assert first in shown  # whole, because the sequence begins with it
    assert "--- document 0 begins, ends, " in shown and shown.count("sequence ") == 3
    assert "sample text  100.00%  100.00%         40,960" in shown
    assert (tmp_path / "document_lengths.png").stat().st_size > 10_000
    lengths = sorted(len(ids) + 2 for ids in load_tokenizer(TOKENIZER).encode_batch(sample_texts()))
    row = shown[shown.index("longer than 256") :].splitlines()[1].split()
    assert row[:3] == ["sample", "text", "2,000"] and row[-1].endswith("%")
    assert int(row[3].replace(",", "")) == pytest.approx(np.median(lengths), rel=0.1)


def test_inspect_leaves_the_job_s_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = ["data", "inspect", *DEBUG, "--data.sources.0.path", str(SAMPLE), "--job.dump_folder", str(tmp_path / "job")]
    assert cli.main([*job, "--batches", "1", "--documents", "9"]) == 0
    assert not (tmp_path / "job").exists() and "longer than 256" in capsys.readouterr().out


def test_inspect_shows_padding(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = ["data", "inspect", *DEBUG, "--data.sources.0.path", str(SAMPLE), "--output", str(tmp_path)]
    assert cli.main([*job, "--sequences", "8", "--data.packing", "pad", "--batches", "1"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sequence ")]
    padding = [int(line.split()[-2]) for line in heads]
    assert len(heads) == 8 and all(", 1 documents, " in line for line in heads) and max(padding) > 100


def test_the_bundled_tokenizer_is_what_the_command_makes_of_the_sample_text(tmp_path: Path) -> None:
    words = ["--source.path", str(SAMPLE), "--vocab_size", "4096", "--output", str(tmp_path)]
    assert cli.main(["data", "train-tokenizer", *words]) == 0
    assert (tmp_path / "tokenizer.json").read_bytes() == (ROOT / "assets/tokenizer/tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["fineweb_edu", "web_code_mix"])
def test_a_job_is_estimated_before_its_tokenizer_is_made_and_says_how_to_make_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ROOT / f"train_configs/{name}.toml"
    config = load_config(["--job.config_file", str(file)])
    monkeypatch.chdir(tmp_path)  # no tokenizer there
    assert resolve(config, 1) == 1 and config.model.vocab_size == 50_304
    with pytest.raises(UserError, match=r"titan-peer data train-tokenizer makes a tokenizer.json"):
        load_tokenizer(config.model.tokenizer_path)
    text = file.read_text(encoding="utf-8")
    assert f"--vocab_size {config.model.vocab_size} --output {config.model.tokenizer_path}\n" in text
    config.model.vocab_size = 0
    with pytest.raises(UserError, match="there is no file"):
        resolve(config, 1)


def test_a_vocabulary_too_small_or_larger_than_the_text_allows_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["aa bb"])
    words = ["data", "train-tokenizer", "--source.path", str(source), "--output", str(tmp_path)]
    assert cli.main([*words, "--vocab_size", "100"]) == 2
    assert "--vocab_size 100: must be at least 258" in capsys.readouterr().err
    assert cli.main([*words, "--vocab_size", "300"]) == 0
    assert "261 entries, not 300: the text has no more pairs to merge" in capsys.readouterr().out
