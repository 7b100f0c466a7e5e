"""OpenAI evals on our models: the package's own evals and data, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("evals") is None:  # importing the package needs an API key
    pytest.skip("needs: pip install --no-deps evals", allow_module_level=True)

from evaluation_helpers import titan_peer

from titan_peer.common.errors import UserError
from titan_peer.evaluation.openai_evals import ModelCompletionFn, OpenAIEval, _package, _Request


def test_a_prompt_is_completed_greedily_as_the_generator_does(language_model):
    with _package(), ModelCompletionFn(language_model) as complete:
        import evals.record
        from evals.base import RunSpec

        recorder = evals.record.DummyRecorder(RunSpec([], "t.t", "t", "t", {}, ""), log=False)
        with recorder.as_default_recorder("t.t.0"):
            answer = complete("In the beginning ", temperature=0.0, max_tokens=8).get_completions()[0]
        (event,) = recorder.get_events("sampling")
    params = language_model.sampling(8, 0.0, None, None)
    assert answer == language_model.generator.generate(["In the beginning"], params)[0].text.strip()
    assert event.data["sampled"] == answer


def test_a_choice_is_the_most_probable_continuation(language_model):
    choices = ["the", "of", "zymurgy"]
    with ModelCompletionFn(language_model, choices) as complete:
        params = language_model.sampling(1, None, None, None)
        picked = complete._most_probable([_Request("And it came to pass in", params, tuple(choices))])
    model, tokenizer = language_model.generator.model, language_model.tokenizer
    scores = {}
    for choice in choices:
        context = [tokenizer.bos_id, *tokenizer.encode_batch(["And it came to pass in"])[0]]
        ids = tokenizer.encode_batch([f" {choice}"])[0]
        logprobs = model(torch.tensor([context + ids]))[0].double().log_softmax(-1)
        scores[choice] = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(ids))
    assert picked == [max(scores, key=scores.get)]


def test_an_evals_verdicts_are_recomputed_from_its_records(language_model, tmp_path: Path):
    """`find-letter` (26 samples, answers yes and no), both by generation and by log-likelihood."""
    result = OpenAIEval("find-letter").run(language_model, tmp_path)
    assert result.samples == 26
    for name, metric in (("find-letter", "accuracy"), ("find-letter.log_likelihood", "accuracy_by_log_likelihood")):
        events = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        matches = [event["data"] for event in events if event.get("type") == "match"]
        right = [m["sampled"].startswith(m["expected"]) for m in matches]
        assert len(right) == 26 and result.metrics[metric] == pytest.approx(sum(right) / 26)
    assert {m["sampled"] for m in matches} <= {"yes", "no"}


def test_half_a_surrogate_pair_or_a_line_separator_in_a_sample_does_not_end_the_eval(
    language_model, tmp_path: Path, monkeypatch, caplog
):
    samples = [{"input": "In the \ud83d beginning", "ideal": "a\ud83d"}, {"input": "x\u2028y\x85z", "ideal": "b\u2028"}]
    data = tmp_path / "samples.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/odd.yaml").write_text(
        f"odd: {{id: odd.dev.v0, metrics: [accuracy]}}\n"
        f"odd.dev.v0: {{class: 'evals.elsuite.basic.match:Match', args: {{samples_jsonl: '{data}'}}}}\n",
        encoding="utf-8",
    )
    prompts = []
    encode = language_model.generator.encode
    monkeypatch.setattr(language_model.generator, "encode", lambda text, *a: prompts.append(text) or encode(text, *a))
    monkeypatch.setattr(language_model, "_said_broken", False)
    result = OpenAIEval("odd", registry_path=str(tmp_path)).run(language_model, tmp_path / "records")
    assert result.samples == 2 and 0 <= result.metrics["accuracy_by_log_likelihood"] <= 1
    assert {"In the \ufffd beginning", "x\u2028y\x85z"} <= set(filter(lambda p: isinstance(p, str), prompts))
    assert caplog.text.count("half of a surrogate pair") == 1
    records = (tmp_path / "records/odd.jsonl").read_text(encoding="utf-8").split("\n")
    matches = [event["data"] for event in map(json.loads, filter(None, records)) if event.get("type") == "match"]
    assert {match["expected"] for match in matches} == {"a\ufffd", "b\u2028"}


def test_completions_are_made_in_batches(language_model, monkeypatch):
    sizes = []
    complete = type(language_model).complete
    monkeypatch.setattr(
        type(language_model), "complete", lambda self, p, s: sizes.append(len(p)) or complete(self, p, s)
    )
    OpenAIEval("rectangles", limit=32).run(language_model)
    free = [size for size in sizes if size]
    assert sum(free) == 32 and max(free) == language_model.batch_size and len(free) <= 8


def test_an_unknown_eval_is_named_with_its_neighbours():
    with pytest.raises(UserError, match=r"no eval 'test-mach'.*test-match"):
        OpenAIEval("test-mach")


def test_the_packages_own_command_finds_a_registered_checkpoint(checkpoint, tmp_path: Path):
    titan_peer("eval", "--checkpoint", checkpoint, "--register-with-oaieval", tmp_path)
    record = tmp_path / "record.jsonl"
    words = ["--registry_path", tmp_path, "--max_samples", 4, "--record_path", record]
    words += ["--completion_args", "device=cpu,max_new_tokens=4,choices=Yes/No"]
    name = f"titan_peer/{checkpoint.as_posix().strip('/')}"
    done = subprocess.run(
        [sys.executable, "-m", "evals.cli.oaieval", name, "rectangles", *map(str, words)],
        env={**os.environ, "OPENAI_API_KEY": "unused", "OPENAI_BASE_URL": "http://127.0.0.1:9", "OPENAI_MAX_RETRIES": "0"},
        capture_output=True,
        text=True,
        timeout=300, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    (report,) = (line["final_report"] for line in lines if "final_report" in line)
    assert 0 <= report["accuracy"] <= 1
    assert {line["data"]["sampled"] for line in lines if line.get("type") == "match"} <= {"Yes", "No"}
