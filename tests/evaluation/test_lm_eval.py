"""lm-eval on our models: the model class compared with plain forward passes, and tasks on local data, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_processes

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from titan_peer.common.errors import UserError
from titan_peer.evaluation.lm_evaluation_harness import BUNDLED_TASKS, TitanPeerLM, tasks

OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def log_probabilities(language_model, ids: list[int]) -> torch.Tensor:
    """float64 [len(ids) - 1, vocab], of the tokens after the first."""
    with torch.no_grad():
        return language_model.generator.model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)


def test_loglikelihood_is_that_of_one_plain_forward_pass(language_model):
    pairs = [("And the word was", " God."), ("", "In the beginning"), ("A hacker is a person who", " enjoys computers")]
    found = TitanPeerLM(language_model).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    tokenizer = language_model.tokenizer
    for (context, continuation), (total, is_greedy) in zip(pairs, found):
        before = len(tokenizer.encode_batch([context])[0]) + 1
        ids = [tokenizer.bos_id, *tokenizer.encode_batch([context + continuation])[0]]
        logprobs = log_probabilities(language_model, ids)[before - 1 :]
        wanted = torch.tensor(ids[before:])
        assert total == pytest.approx(logprobs.gather(1, wanted[:, None]).sum().item(), abs=1e-3)
        assert is_greedy == bool((logprobs.argmax(-1) == wanted).all())


def test_rolling_loglikelihood_of_a_text_longer_than_the_context_predicts_every_token_once(language_model, monkeypatch):
    text = " ".join(str(i) for i in range(80))
    ids = language_model.tokenizer.encode_batch([text])[0]
    context = 64
    assert len(ids) > 2 * context
    monkeypatch.setattr(language_model.generator.model.args, "max_seq_len", context)
    (found,) = TitanPeerLM(language_model).loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    expected, done = 0.0, 0
    while done < len(ids):  # windows of the context's length; each predicts only tokens that no earlier one predicts
        end = min(done + context, len(ids))
        window = [language_model.tokenizer.bos_id, *ids][end - min(end, context) : end + 1]
        logprobs = log_probabilities(language_model, window)[done - end :]
        expected += logprobs.gather(1, torch.tensor(ids[done:end])[:, None]).sum().item()
        done = end
    assert found == pytest.approx(expected, abs=1e-2)


def test_generate_until_is_greedy_and_ends_before_the_stop_string(language_model):
    prompt = "In the beginning was the"
    model = TitanPeerLM(language_model)
    (free,) = model.generate_until(instances("generate_until", (prompt, {"max_gen_toks": 12})))
    ids = language_model.generator.encode(prompt)
    for _ in range(12):  # without a cache
        with torch.no_grad():
            ids.append(language_model.generator.model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == language_model.tokenizer.eos_id:
            break
    assert language_model.tokenizer.decode(ids).endswith(prompt + free)
    stop = free.strip()[2:4]
    (cut,) = model.generate_until(instances("generate_until", (prompt, {"max_gen_toks": 12, "until": [stop]})))
    assert cut == free[: free.index(stop)]


def test_half_a_surrogate_pair_in_a_request_is_scored_as_a_replacement_character(language_model):
    found, wanted = (
        TitanPeerLM(language_model).loglikelihood(
            instances("loglikelihood", (f"one {x}", f" two{x}")), disable_tqdm=True
        )
        for x in ("\ud83d", "\ufffd")
    )
    assert found == wanted
    found, wanted = (
        TitanPeerLM(language_model).generate_until(
            instances("generate_until", (f"one {x}", {"max_gen_toks": 5, "until": ["\udc00"]}))
        )
        for x in ("\ud83d", "\ufffd")
    )
    assert found == wanted


def test_the_lm_eval_command_knows_the_model_through_a_task_file(checkpoint, tmp_path: Path):
    words = [
        "--model",
        "titan_peer",
        "--model_args",
        f"checkpoint={checkpoint}",
        "--batch_size",
        "8",
    ]
    words += ["--tasks", BUNDLED_TASKS / "sample_text_continuation.yaml", "--limit", "4", "--output_path", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, words)],
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "there is none, so the model is on the CPU" in done.stderr
    assert "sample_text_continuation" in done.stdout
    (report,) = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(report.read_text(encoding="utf-8"))["results"]["sample_text_continuation"]["acc,none"] <= 1


def test_an_unknown_task_is_named_with_its_neighbours():
    with pytest.raises(UserError, match=r"no task 'sample_text_copi'.*sample_text_copy"):
        tasks(["sample_text_copi"])


def test_a_task_whose_data_must_be_downloaded_is_refused_without_a_network(checkpoint, tmp_path: Path):
    """With the library's own offline mode; a machine without a network gives the same result after some attempts."""
    words = ["eval", "--checkpoint", checkpoint, "--tasks", "arc_easy"]
    done = warm_processes.run(warm_processes.TITAN_PEER, *words, **OFFLINE, HF_HOME=str(tmp_path))
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    first, advice = done.stderr.splitlines()[-2:]
    assert first.startswith("error: tasks: arc_easy: its data cannot be loaded: ")
    assert "run this once with a network" in advice and "sample_text_copy" in advice
