"""`titan-peer eval`: the table it prints, what it refuses, and where it writes."""

from __future__ import annotations

import json

import pytest
from evaluation_helpers import VALIDATION

from titan_peer import cli


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to evaluate: give --perplexity, --evals or --tasks"),
        (["--perplexity", "no/such.jsonl"], "--perplexity.path = no/such.jsonl"),
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
