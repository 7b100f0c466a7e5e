"""Tuning the kernels of a job, here with interpreted kernels; tests/gpu does it on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titan_peer.analysis.kernel_tuning import host_milliseconds, tune
from titan_peer.commands.tune import main
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config
from titan_peer.ops import reference
from titan_peer.ops import triton as kernels
from titan_peer.ops.triton import tuning

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--model.dim", "32", "--model.peer.num_experts", "4356", "--model.peer.product_key_dim", "66", "66"]
TINY += ["--model.peer.num_heads", "1", "--model.peer.num_experts_per_tok", "2", "--model.peer.query_dim", "16"]

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, kernels are not interpreted")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TITAN_PEER_CACHE_DIR", str(tmp_path))
    tuning._tuned.cache_clear()
    yield
    tuning._tuned.cache_clear()


def job(*changes: str) -> JobConfig:
    return load_config(["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), *TINY, *changes])


@interpreted
@pytest.mark.parametrize("update", ["rowwise", "dense"])
def test_the_fastest_candidate_is_kept_and_used_later(update: str) -> None:
    device = torch.device("cpu")
    results = tune(job("--optimizer.expert_update", update), device, 1, host_milliseconds)
    kinds = ["experts_forward", "experts_backward", "best_sub_keys", "table_gradient"]
    kinds += ["row_norm", "adamw"] if update == "rowwise" else ["table_gradient"]
    assert sorted(problem.kernel for problem in results) == sorted(kinds)
    assert all(result.best_ms <= result.rule_ms for result in results.values())
    path = tuning.save({problem: result.best for problem, result in results.items()}, device)
    assert path == tuning.tuning_file()
    assert all(tuning.launch_for(problem, device) == result.best for problem, result in results.items())


@interpreted
def test_every_candidate_gives_the_same_result() -> None:
    torch.manual_seed(0)
    x, gates, indices = torch.randn(2, 32), torch.rand(2, 5), torch.randint(9, (2, 5))
    down, up = torch.randn(9, 1, 32), torch.randn(9, 1, 32)
    expected, _ = reference.peer_forward(x, indices, gates, down, up, "gelu")
    problem = tuning.problem("experts_forward", down, 5, 1, 32)
    for launch in tuning.candidates(problem):
        with tuning.forced(problem, launch):
            y, _ = kernels.peer_forward(x, indices, gates, down, up, "gelu")
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@interpreted
def test_a_damaged_tuning_file_is_named_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    problem = tuning.Problem("adamw", 64, 8, 1, torch.float32, True)
    tuning.save({problem: tuning.Launch(16, 2)}, device)
    assert tuning.launch_for(problem, device) == tuning.Launch(16, 2)
    content = json.loads(tuning.tuning_file().read_text(encoding="utf-8"))
    for broken in ("{", "[]", json.dumps({section: {str(problem): {"blok": 1}} for section in content})):
        tuning.tuning_file().write_text(broken, encoding="utf-8")
        tuning._tuned.cache_clear()
        caplog.clear()
        assert tuning.launch_for(problem, device) == tuning.by_rule(problem)
        assert broken == "[]" or str(tuning.tuning_file()) in caplog.text


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        main(["--config_file", str(ROOT / "train_configs/debug_model.toml")])


@pytest.mark.parametrize("flag", ["--job.config_file", "--config_file", "--config-file"])
def test_no_tokens_are_refused_and_not_taken_for_the_job_s_own_number(flag: str) -> None:
    with pytest.raises(UserError, match="--tokens 0: must be at least 1"):
        main([flag, str(ROOT / "train_configs/debug_model.toml"), "--tokens", "0"])
