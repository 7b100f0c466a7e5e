"""`titan-peer eval`: its table, its error messages and its files."""

from __future__ import annotations

import json
import logging

import pytest
from evaluation_helpers import VALIDATION

from titan_peer.commands import main as cli


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to evaluate: give --perplexity, --evals or --tasks"),
        (["--perplexity", "no/such.jsonl"], "--perplexity no/such.jsonl: is not a file, a folder with"),
        (["--perplexity", "a="], "--perplexity a=: needs a path, after NAME= if it is to have a name"),
        (["--perplexity", VALIDATION, "--limit", "0"], "--limit 0: must be at least 1, or -1 for all"),
        (["--perplexity", VALIDATION, "--device", "tpu9"], "device = tpu9: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_mistake_is_one_clear_message(checkpoint, more, message, capsys):
    assert cli.main(["eval", "--checkpoint", str(checkpoint), *map(str, more)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, capsys):
    for more in (["--perplexity", str(VALIDATION)], ["--register-with-oaieval", str(tmp_path)]):
        assert cli.main(["eval", "--checkpoint", str(tmp_path), *more]) == 2
        assert str(tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_named_set_gives_a_row_a_metric(checkpoint, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(VALIDATION.read_text(encoding="utf-8").splitlines()[:5]), encoding="utf-8")
    output = tmp_path / "new"
    words = ["eval", "--checkpoint", checkpoint, "--perplexity", f"held out={few}", "--output", output]
    assert cli.main(list(map(str, words))) == 0
    (result,) = json.loads((output / "results.json").read_text(encoding="utf-8"))["results"]
    assert result["name"] == "held out" and set(result["metrics"]) == {"loss", "perplexity", "bits_per_byte"}
    assert capsys.readouterr().out.count("held out") == 3


def test_text_that_cannot_be_read_is_named_as_it_was_given(checkpoint, tmp_path, capsys):
    """At the start of the set, and in the middle of it, after which the other evaluations continue."""
    first, later, good = (tmp_path / name for name in ("first.jsonl", "later=1.jsonl", "good.txt"))
    line = VALIDATION.read_text(encoding="utf-8").splitlines()[0]
    first.write_text('{"body": "x"}\n', encoding="utf-8")
    later.write_text(f"{line}\n" * 50 + '{"body": "x"}\n', encoding="utf-8")
    good.write_text("In the beginning", encoding="utf-8")
    assert cli.main(["eval", "--checkpoint", str(checkpoint), "--perplexity", str(first)]) == 2
    problem = (
        "has no text under text_key = 'text'; its keys: 'body'; a set in a job's [[evaluation.perplexity]] may have"
    )
    shown = capsys.readouterr()
    assert f"error: --perplexity: {first}:1: {problem}" in shown.err
    words = ["--perplexity", str(later), "--perplexity", str(good), "--output", str(tmp_path / "out")]
    assert cli.main(["eval", "--checkpoint", str(checkpoint), *words]) == 1
    failed, fine = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["results"]
    assert failed["error"].startswith(f"--perplexity: {later}:51: {problem}") and not fine["error"]
    assert "validation" not in failed["error"]
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err


def test_only_what_generates_tells_how_it_decodes(checkpoint, tmp_path, caplog):
    few = tmp_path / "few.txt"
    few.write_text("In the beginning", encoding="utf-8")
    for more, told in (([], False), (["--evals", "test-match", "--limit", "1"], True)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "titan_peer"):
            cli.main(["eval", "--checkpoint", str(checkpoint), "--perplexity", str(few), *more])
        assert ("decode attention" in caplog.text) == told
