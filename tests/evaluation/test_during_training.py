"""Evaluations inside a training job: at their steps, on its weights, without an effect on the training."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
if importlib.util.find_spec("evals") is None:  # importing the package needs an API key
    pytest.skip("needs: pip install --no-deps evals", allow_module_level=True)

import warm_processes
from evaluation_helpers import QUICK, ROOT, titan_peer
from processes import train_jobs

from titan_peer import train
from titan_peer.commands import main as cli
from titan_peer.config.parse import load_config
from titan_peer.distributed.parallelize import parallelize
from titan_peer.distributed.world import World
from titan_peer.evaluation.during_training import PeriodicEvaluation, whole_model
from titan_peer.evaluation.results import BOOTSTRAP_OF
from titan_peer.evaluation.suite import generative_evaluations

SMALL = [*QUICK, "--model.n_layers", "2", "--training.seq_len", "64", "--training.steps", "6"]
EVALUATION = """
[evaluation]
enable = true
freq = 3
evals = ["test-match", "find-letter"]
tasks = ["sample_text_continuation", "sample_text_copy"]
limit = 4
max_new_tokens = 4

[[evaluation.perplexity]]
name = "held out"
path = "assets/sample_text/validation.jsonl"

[[evaluation.perplexity]]
name = "task texts"
path = "titan_peer/evaluation/lm_eval_tasks/texts.jsonl"
"""


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("job") / "job.toml"
    file.write_text(
        (ROOT / "train_configs/debug_model.toml").read_text(encoding="utf-8") + EVALUATION, encoding="utf-8"
    )
    return file


def arguments(job_file: Path, folder: Path, *more: object) -> list[str]:
    settings = [job_file if word == "train_configs/debug_model.toml" else word for word in SMALL]
    return list(map(str, [*settings, "--job.dump_folder", folder, *more]))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluated(job_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    titan_peer("train", *arguments(job_file, folder, "--metrics.enable_tensorboard", "true"))
    return folder


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    prefix = "evaluation/"
    found = {}
    for record in records(folder):
        values = {key.removeprefix(prefix): v for key, v in record.items() if key.startswith(prefix)}
        if values:
            found[record["step"]] = values
    return found


def test_results_are_in_the_metrics_the_table_tensorboard_and_a_plot(evaluated: Path):
    found = evaluations(evaluated)
    assert list(found) == [3, 6]
    names = {"perplexity/held out/perplexity", "perplexity/task texts/bits_per_byte", "evals/test-match/accuracy"}
    names |= {"evals/find-letter/accuracy_by_log_likelihood", "tasks/sample_text_continuation/acc"}
    names |= {"tasks/sample_text_copy/exact_match"}
    assert all(names <= set(values) for values in found.values())
    assert not any("failed" in key for values in found.values() for key in values)
    assert found[6]["perplexity/held out/loss"] < found[3]["perplexity/held out/loss"]
    table = (evaluated / "evaluation.md").read_text(encoding="utf-8")
    assert all(word in table for word in ("step 3", "step 6", "held out", "find-letter", "sample_text_copy"))
    assert (evaluated / "evaluation.png").stat().st_size > 10_000
    assert (evaluated / "evaluation/step-6/find-letter.jsonl").is_file()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(evaluated / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("evaluation/tasks/sample_text_continuation/acc")] == [3, 6]


def test_training_takes_the_same_course_with_and_without(evaluated: Path, job_file: Path, tmp_path: Path):
    titan_peer("train", *arguments(job_file, tmp_path, "--evaluation.enable", "false"))
    with_evaluation = [r["loss"] for r in records(evaluated) if "loss" in r]
    assert len(with_evaluation) == 6 and with_evaluation == [r["loss"] for r in records(tmp_path)]


def alone(checkpoint: Path, output: Path) -> dict[str, float]:
    """The results of `titan-peer eval` on a checkpoint, under the names that a job's evaluation uses."""
    words = ["--perplexity", "held out=assets/sample_text/validation.jsonl"]
    words += ["--perplexity", "task texts=titan_peer/evaluation/lm_eval_tasks/texts.jsonl"]
    words += ["--evals", "test-match,find-letter", "--tasks", "sample_text_continuation,sample_text_copy", "--limit", 4]
    words += ["--max-new-tokens", 4, "--precision", "float32", "--output", output]
    assert cli.main(["eval", "--checkpoint", str(checkpoint), *map(str, words)]) == 0
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))["results"]
    return {
        f"{r['kind']}/{r['name']}/{metric}": value
        for r in results
        for metric, value in {**r["metrics"], "samples": r["samples"]}.items()
    }


def assert_near(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys() and len(found) >= 12
    for key, value in expected.items():
        # the evals package draws a thousand random samples for its standard errors
        tolerance = 0.2 if key.endswith(BOOTSTRAP_OF["accuracy_by_log_likelihood"]) else 1e-4
        assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-6), key


def test_the_last_evaluation_is_that_of_the_saved_checkpoint(evaluated: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert_near(evaluations(evaluated)[6], alone(evaluated / "checkpoint/step-6", tmp_path))


def test_two_processes_with_sharded_tables_find_what_the_checkpoint_alone_gives(
    job_file: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    more = ["--training.steps", 3, "--parallelism.expert_parallel_degree", 2]
    train_jobs(2, [arguments(job_file, tmp_path, *more)])
    assert_near(evaluations(tmp_path)[3], alone(tmp_path / "checkpoint/step-3", tmp_path / "alone"))


def test_a_job_that_is_told_to_stop_does_not_wait_for_its_evaluations(job_file: Path, tmp_path: Path):
    more = ["--training.steps", 1000, "--checkpoint.interval", 3, "--evaluation.limit", -1]
    more += [
        "--evaluation.max_new_tokens",
        30,
        "--evaluation.evals",
        "syllables.dev.v1",
        "quartz.test.v1",
    ]  # 1,552 and 3,860 samples
    process = warm_processes.start(warm_processes.TRAIN, *arguments(job_file, tmp_path, *more))
    deadline = time.monotonic() + 400
    while not (tmp_path / "evaluation/step-3/syllables.dev.v1.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0 and "the same command resumes" in process.stderr
    assert not any("failed" in key for values in evaluations(tmp_path).values() for key in values)
    assert (tmp_path / "checkpoint/step-4").is_dir()


def test_a_failing_evaluation_is_logged_and_training_goes_on(job_file: Path, tmp_path: Path):
    bad = tmp_path / "tasks"
    bad.mkdir()
    (bad / "numbers.jsonl").write_text('{"n": 1}\n{"n": 0}\n', encoding="utf-8")
    (bad / "bad.yaml").write_text(
        f"task: bad\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {bad / 'numbers.jsonl'}\n"
        "output_type: loglikelihood\ntest_split: test\ndoc_to_text: '{{1 // n}}'\ndoc_to_target: 'x'\n",
        encoding="utf-8",
    )
    more = ["--evaluation.tasks_folder", bad, "--evaluation.tasks", "bad", "sample_text_copy"]
    more += ["--evaluation.evals", "find-letter", "--training.steps", 3]
    done = titan_peer("train", *arguments(job_file, tmp_path / "out", *more))
    assert "evaluation bad of tasks failed" in done.stderr
    found = evaluations(tmp_path / "out")[3]
    assert found["tasks/bad/failed"] == 1 and "tasks/sample_text_copy/exact_match" in found
    assert "failed" in (tmp_path / "out/evaluation.md").read_text(encoding="utf-8")


def missing_data(folder: Path) -> Path:
    """A folder with a task whose data do not exist."""
    folder.mkdir()
    (folder / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: no_such_file.jsonl\n"
        "output_type: loglikelihood\ntest_split: test\n",
        encoding="utf-8",
    )
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_task_without_its_data_ends_the_job_before_it_starts(job_file: Path, tmp_path: Path, processes: int):
    """With two processes, the second one runs it."""
    more = ["--evaluation.tasks_folder", missing_data(tmp_path / "tasks"), "--evaluation.evals", "find-letter"]
    job = arguments(job_file, tmp_path / "out", *more, "--evaluation.tasks", "gone")
    if processes == 1:
        done = warm_processes.run(warm_processes.TRAIN, *job)
    else:
        environment = {**os.environ, "NGPU": str(processes), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        command = ["./run_train.sh", *job]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300
        )
    assert done.returncode != 0 and not (tmp_path / "out/metrics.jsonl").exists()
    assert "error: tasks: gone: its data cannot be loaded: FileNotFoundError" in done.stderr
    if processes == 1:
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--evaluation.evals", "no-such-eval"], "no eval 'no-such-eval'"),
        (["--evaluation.tasks", "sample_text_copi"], "no task 'sample_text_copi'"),
        (["--evaluation.perplexity.1.name", "held out"], "two sets are called 'held out'"),
        (["--evaluation.limit", "0"], "evaluation.limit = 0: must be at least 1 or -1"),
        (["--evaluation.perplexity.1.path", "no/such.jsonl"], "evaluation.perplexity[1].path = no/such.jsonl"),
    ],
)
def test_a_mistake_in_the_section_is_found_before_training(
    job_file: Path, tmp_path: Path, more: list, message: str, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    assert train.main(arguments(job_file, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_section_in_the_docs_is_a_valid_one(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"), re.S)
    file = tmp_path / "job.toml"
    file.write_text((ROOT / "train_configs/debug_model.toml").read_text(encoding="utf-8") + block, encoding="utf-8")
    settings = load_config(["--job.config_file", str(file)]).evaluation
    assert settings.enable and settings.perplexity[0].name == "held out"
    assert len(generative_evaluations(settings)) == len(settings.evals) + len(settings.tasks) > 0


def live_tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            # tensors that a compiler has left from other tests may have no memory of their own
            with contextlib.suppress(RuntimeError):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_memory_random_number_or_setting_is_left_behind(job_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(arguments(job_file, tmp_path))
    config.model.vocab_size = 4096
    from titan_peer.data.tokenizer import load_tokenizer
    from titan_peer.model import Transformer

    world = World(0, 1, torch.device("cpu"), None, None)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    model = Transformer(config.model)
    model.init_weights()
    parallelize(model, config, world)
    evaluation = PeriodicEvaluation(config, tokenizer, world)
    evaluation.held_out = []
    evaluation.settings.perplexity = []
    gc.disable()
    try:
        evaluation.run(1, model, lambda batches: None, lambda: False)  # allocates what libraries keep permanently
        random_state, environment = torch.get_rng_state(), dict(os.environ)
        before = live_tensor_bytes()
        results = evaluation.run(2, model, lambda batches: None, lambda: False)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert len(results) == 4 and not any(r.error for r in results)
    assert live_tensor_bytes() == before
    assert torch.equal(torch.get_rng_state(), random_state) and dict(os.environ) == environment
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_the_plain_model_shares_the_weights_of_a_single_process():
    config = load_config([*map(str, SMALL), "--model.vocab_size", "4096", "--model.tie_embeddings", "true"])
    from titan_peer.model import Transformer

    model = Transformer(config.model)
    model.init_weights()
    plain = whole_model(model, config.model, torch.device("cpu"))
    theirs = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in plain.parameters()} == theirs
    assert plain.output.weight is plain.tok_embeddings.weight and not plain.training
    tokens = torch.randint(0, 4096, (2, 32))
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), plain(tokens))
