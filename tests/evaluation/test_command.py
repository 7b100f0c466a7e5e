"""`titan-peer eval`: what it refuses, and where it writes."""

from __future__ import annotations

import json

import pytest
from evaluation_helpers import VALIDATION, titan_peer


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to evaluate: give --perplexity, --evals or --tasks"),
        (["--perplexity", "no/such.jsonl"], "--perplexity.path = no/such.jsonl"),
        (["--perplexity", VALIDATION, "--limit", "0"], "--limit 0: must be at least 1, or -1 for all"),
        (["--perplexity", VALIDATION, "--device", "tpu9"], "device = tpu9: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_mistake_is_one_clear_message(checkpoint, more, message):
    done = titan_peer("eval", "--checkpoint", checkpoint, *more, status=2)
    assert message in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    for more in (["--perplexity", VALIDATION], ["--register-with-oaieval", tmp_path]):
        done = titan_peer("eval", "--checkpoint", tmp_path, *more, status=2)
        assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_named_set_gives_a_row_a_metric(checkpoint, tmp_path):
    done = titan_peer(
        "eval", "--checkpoint", checkpoint, "--perplexity", f"held out={VALIDATION}", "--output", tmp_path / "new"
    )
    (result,) = json.loads((tmp_path / "new/results.json").read_text())["results"]
    assert result["name"] == "held out" and set(result["metrics"]) == {"loss", "perplexity", "bits_per_byte"}
    assert done.stdout.count("held out") == 3 and "evaluation held out" in done.stderr
