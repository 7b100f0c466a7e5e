"""Bad steps are skipped as if their batch had never been seen; too many of them end the job."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from small_jobs import SMALL, tensors_of, trainer

from titan_peer.config.job import Training
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.failures import NonFiniteLossError
from titan_peer.step_guard import StepGuard
from titan_peer.trainer import Trainer

SKIPS = ["--training.skip_bad_steps", 2, "--lr_scheduler.warmup_steps", 0, "--lr_scheduler.decay_ratio", 0]


def spoil(job: Trainer, steps: set[int], factor: float = math.nan) -> None:
    """Multiply the gradient of one parameter at these steps."""
    head = job.model.output.weight
    head.register_hook(lambda gradient: gradient * factor if job.step in steps else gradient)


def leave_out(job: Trainer, steps: set[int]) -> None:
    """Read the batches of these steps without a step."""
    train_step = job.train_step

    def without(batches: Any) -> Any:
        while job.step in steps:
            next(batches)
            job.step += 1
        return train_step(batches)

    job.train_step = without  # type: ignore[method-assign]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_leaves_everything_as_it_was(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*SKIPS, "--optimizer.name", name, "--optimizer.lr", 1e-3]
    skipping, without = trainer(tmp_path / "skipping", *settings), trainer(tmp_path / "without", *settings)
    spoil(skipping, {2, 3})
    leave_out(without, {2, 3})
    assert skipping.train() == without.train() == 0
    found, expected = records(tmp_path / "skipping"), records(tmp_path / "without")
    assert [(r["step"], r["loss"]) for r in found if "loss" in r] == [
        (r["step"], r["loss"]) for r in expected if "loss" in r
    ]
    assert [(r["step"], r["skipped_steps"]) for r in found if "skipped_steps" in r] == [(2, 1), (3, 2)]
    assert "step 3 is skipped: " in caplog.text and "(2 in a row, 2 in all)" in caplog.text
    saved = [tensors_of(tmp_path / folder / "checkpoint/step-6") for folder in ("skipping", "without")]
    assert saved[0].keys() == saved[1].keys()
    for key, tensor in saved[0].items():
        if isinstance(tensor, torch.Tensor) and not key.startswith("rng."):
            assert torch.equal(tensor, saved[1][key]), key


def test_a_norm_far_above_the_usual_is_skipped_and_counted_over_a_resume(tmp_path: Path) -> None:
    settings = [*SKIPS, "--training.bad_step_norm_factor", 5, "--training.steps", 22, "--checkpoint.interval", 20]
    straight = trainer(tmp_path / "straight", *settings)
    spoil(straight, {19, 21}, factor=1000)
    straight.train()
    skipped = [r["step"] for r in records(tmp_path / "straight") if "skipped_steps" in r]
    assert skipped == [19, 21] and len(straight.guard.norms) == 22
    resumed = trainer(tmp_path / "straight", *settings, "--checkpoint.load_step", 20)
    assert resumed.guard.skipped == 1 and list(resumed.guard.norms) == list(straight.guard.norms)[:20]
    spoil(resumed, {21}, factor=1000)
    resumed.train()
    assert resumed.guard.state_dict() == straight.guard.state_dict()


def test_more_bad_steps_in_a_row_than_allowed_end_the_job(tmp_path: Path) -> None:
    job = trainer(tmp_path, *SKIPS)
    spoil(job, {2, 4, 5, 6})
    with pytest.raises(
        NonFiniteLossError, match=r"step 6: .* \(3 in a row, 4 in all\), more than training.skip_bad_steps"
    ):
        job.train()
    assert any("alert" in record for record in records(tmp_path))
    at_once = trainer(tmp_path / "none", "--lr_scheduler.warmup_steps", 0)
    spoil(at_once, {2})
    with pytest.raises(NonFiniteLossError, match="step 2: loss = "):
        at_once.train()


def train_with_a_bad_process(folder: str) -> list[str]:
    config = load_config([*map(str, [*SMALL, *SKIPS, "--training.local_batch_size", 1, "--job.dump_folder", folder])])
    job = Trainer(config, init_world(config.parallelism))
    if job.world.rank == 1:
        allows = job.guard.allows
        infinite = torch.tensor(math.inf)
        job._update.may_update = lambda loss, norm: allows(infinite if job.step == 3 else loss, norm)
    told: list[str] = []
    require = job._require_good
    job._require_good = lambda result: (told.append(result.skipped), require(result))[1]  # type: ignore[method-assign]
    job.train()
    return told


def test_processes_skip_together_what_is_bad_on_one(tmp_path: Path) -> None:
    first, second = run_in_processes(2, train_with_a_bad_process, str(tmp_path))
    assert [bool(why) for why in first] == [bool(why) for why in second] == [False, False, True, False, False, False]
    assert first[2] == "the loss is not finite on another process" and "inf" in second[2]


def test_a_norm_factor_without_steps_to_skip_is_refused() -> None:
    (problem,) = Training(bad_step_norm_factor=5.0).problems()
    assert problem == "training.bad_step_norm_factor = 5.0: has no effect without training.skip_bad_steps"
    assert not Training(bad_step_norm_factor=5.0, skip_bad_steps=1).problems()


def test_the_median_follows_norms_that_have_risen_for_good() -> None:
    guard = StepGuard(Training(skip_bad_steps=200, bad_step_norm_factor=3.0), lambda votes: votes)

    def allowed(norm: float) -> bool:
        return guard.allows(torch.tensor(1.0), torch.tensor(norm))

    assert all(allowed(1.0) for _ in range(15)) and allowed(100.0)  # too few to judge yet
    assert not allowed(100.0) and allowed(2.9)
    assert [allowed(10.0) for _ in range(40)].count(False) == 14  # until half of what is remembered is as high
