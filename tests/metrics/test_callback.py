"""The callbacks of a training run are called at the right moments; a new number per step needs only one function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_jobs import trainer

from titan_peer.common.errors import UserError
from titan_peer.metrics.callback import Callback, RunEnd, Step
from titan_peer.metrics.step_metrics import STEP_METRICS, ReportedStep
from titan_peer.trainer import Trainer


class Diary(Callback):
    """Records its calls, and whether the checkpoint of the step exists at that time."""

    def __init__(self, job: Trainer) -> None:
        self.job, self.notes, self.ends = job, [], []
        self.weights: dict[int, float] = {}

    def start(self) -> None:
        self.notes.append("start")

    def begin(self, doing: str) -> None:
        self.notes.append(doing)

    def after_update(self, step: Step) -> None:
        self.notes.append(f"updated {step.number}")
        self.weights[step.number] = self.job.model.norm.weight.sum().item()

    def after_step(self, step: Step) -> None:
        self.notes.append(f"done {step.number}, last {step.is_last}, saved {self.job.checkpointer.saved_step}")

    def end(self, end: RunEnd) -> None:
        self.ends.append(end)


def with_diary(folder: Path, *arguments: object) -> tuple[Trainer, Diary]:
    job = trainer(folder, "--training.steps", 2, *arguments)
    diary = Diary(job)
    job.callbacks.append(diary)
    return job, diary


def test_a_part_is_called_at_every_moment_in_order(tmp_path: Path) -> None:
    validation = ["--validation.enable", "true", "--validation.freq", 2, "--validation.steps", 1]
    job, diary = with_diary(tmp_path, *validation)
    assert job.train() == 0
    assert diary.notes == [
        "start",
        "step 1",
        "updated 1",
        "done 1, last False, saved 0",
        "step 2",
        "updated 2",
        "validation after step 2",
        "saving the checkpoint of step 2",
        "done 2, last True, saved 2",
    ]
    assert diary.weights[1] != diary.weights[2]
    assert diary.ends == [RunEnd(2)]


def test_a_part_is_told_of_a_failure_and_that_nobody_can_be_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, diary = with_diary(tmp_path)

    def fails(batches: object) -> None:
        raise UserError("no more disk")

    monkeypatch.setattr(job, "train_step", fails)
    with pytest.raises(UserError):
        job.train()
    (end,) = diary.ends
    assert isinstance(end.failure, UserError) and not end.together
    assert diary.notes == ["start", "step 1"]


class Stubborn(Callback):
    def end(self, end: RunEnd) -> None:
        raise ValueError("does not end")


@pytest.mark.parametrize("fails", [False, True])
def test_a_part_that_cannot_end_leaves_nothing_else_open(tmp_path: Path, caplog, fails: bool) -> None:
    job, diary = with_diary(tmp_path, "--checkpoint.interval", 1, "--checkpoint.async_mode", "async")
    job.callbacks.append(Stubborn())  # ends before the diary
    if fails:
        diary.after_step = lambda step: (_ for _ in ()).throw(RuntimeError("the run fails"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError if fails else ValueError, match="the run fails" if fails else "does not end"):
        job.train()
    assert len(diary.ends) == 1 and "Stubborn could not end" in caplog.text
    saved = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert saved == (["step-1"] if fails else ["step-1", "step-2"])


def test_a_number_that_is_added_to_the_table_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def norm_of_gains(step: ReportedStep) -> float:
        return step.model.norm.weight.norm().item()

    monkeypatch.setitem(STEP_METRICS, "norm_of_gains", norm_of_gains)
    monkeypatch.setitem(STEP_METRICS, "unknown_here", lambda step: None)
    job = trainer(tmp_path, "--training.steps", 2, "--checkpoint.enable", "false")
    assert job.train() == 0
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["norm_of_gains"] == torch.linalg.vector_norm(job.model.norm.weight.detach()).item()
    assert records[0]["norm_of_gains"] != records[1]["norm_of_gains"]
    assert "unknown_here" not in records[0]
