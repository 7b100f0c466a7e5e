"""At least ten evals of the evals package and the bundled lm-eval tasks, in one command, without network."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from evaluation_helpers import titan_peer

pytest.importorskip("lm_eval")
if importlib.util.find_spec("evals") is None:  # importing the package needs an API key
    pytest.skip("needs: pip install --no-deps evals", allow_module_level=True)

# Kinds: match, includes, fuzzy match; open and closed answers; chat and plain prompts; few-shot.
EVALS = ["test-match", "test-includes", "test-fuzzy-match", "rectangles", "find-letter", "gears_rotation"]
EVALS += ["track_objects", "number_series_test", "cube-pack", "pattern_identification", "polish-lexicon"]
TASKS = ["sample_text_perplexity", "sample_text_continuation", "sample_text_last_word", "sample_text_copy"]
LIMIT = 6


@pytest.fixture(scope="module")
def command(checkpoint, tmp_path_factory):
    """(the output of the command, its folder)."""
    folder = tmp_path_factory.mktemp("results")
    done = titan_peer(
        "eval", "--checkpoint", checkpoint, "--evals", ",".join(EVALS), "--tasks", ",".join(TASKS), "--limit", LIMIT,
        "--max-new-tokens", 6, "--precision", "float32", "--output", folder,
    )  # fmt: skip
    return done, folder


def results(folder: Path) -> dict[str, dict]:
    return {r["name"]: r for r in json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]}


def test_all_run_to_the_end_and_give_a_table(command):
    done, folder = command
    found = results(folder)
    assert list(found) == EVALS + TASKS and not any(r["error"] for r in found.values())
    assert all(0 < r["samples"] <= LIMIT for r in found.values())
    assert all(0 <= found[name]["metrics"]["accuracy"] <= 1 for name in EVALS)
    assert all(f"| {name} " in done.stdout for name in EVALS + TASKS) and "Traceback" not in done.stderr
    assert done.stdout.strip() in (folder / "results.md").read_text(encoding="utf-8")


def test_the_tasks_numbers_follow_from_their_records(command):
    found, folder = results(command[1]), command[1]
    for task, metric in (("sample_text_continuation", "acc"), ("sample_text_copy", "exact_match")):
        records = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert found[task]["metrics"][metric] == pytest.approx(sum(r[metric] for r in records) / LIMIT)
    records = [
        json.loads(line) for line in (folder / "sample_text_perplexity.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    nll = -sum(r["filtered_resps"][0] for r in records)
    num_bytes = sum(len(r["doc"]["text"].encode()) for r in records)
    bits = found["sample_text_perplexity"]["metrics"]["bits_per_byte"]
    assert bits == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-6)
