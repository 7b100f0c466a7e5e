"""The optional parts of a training run: when each of them is called, and what it may use.

A part is a subclass of `Callback` beside what it does (expert usage in `experts/`, evaluation in `evaluation/`), and
one line of `Trainer._optional_parts`. The loop calls all parts alike and knows none of them by name.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from titan_peer.config.job import JobConfig
from titan_peer.distributed.world import World
from titan_peer.metrics.held_out_loss import TrainingModelLoss
from titan_peer.metrics.logger import MetricsLogger
from titan_peer.model import Transformer
from titan_peer.optim.optimizers import Optimizers


@dataclass(frozen=True)
class Run:
    """What a callback may use of its training run."""

    config: JobConfig
    world: World
    model: Transformer
    """On its device, with the plans of the job applied, and not run yet."""
    optimizers: Optimizers
    metrics: MetricsLogger
    """Reports numbers, lines, histograms and images."""
    held_out_loss: TrainingModelLoss
    precision: Callable[[], AbstractContextManager[object]]
    """The context in which the model computes as in training."""
    resumed_step: int
    """Steps that the job had done before."""
    begin: Callable[[str], None]
    """Says what the run does now: calls `Callback.begin` of every part."""
    should_stop: Callable[[], bool]
    """Whether this process has been told to stop; the others may not know yet."""

    @property
    def dump_folder(self) -> Path:
        return Path(self.config.job.dump_folder)


@dataclass(frozen=True)
class Step:
    """A step that has been done."""

    number: int
    is_last: bool
    stop: bool
    """The run ends after this step, as all processes have agreed."""


@dataclass(frozen=True)
class RunEnd:
    """How a run ended."""

    step: int
    """The last step; after a failure, the one that failed."""
    failure: BaseException | None = None
    together: bool = True
    """Whether all processes end at this place; otherwise one has failed and nothing may wait for the others."""


class Callback:
    """An optional part of a training run. A subclass overrides the moments that it needs.

    Every process calls the same moments in the same order, so a callback may communicate (except in `begin`, and in
    `end` unless `RunEnd.together`). A part that only the first process has must not communicate.
    """

    def start(self) -> None:
        """The first step is next."""

    def begin(self, doing: str) -> None:
        """The run begins something that may take long, such as "step 7"."""

    def before_update(self, step: int) -> None:
        """The gradient of step `step` is complete, and the weights are those that it is of."""

    def after_update(self, step: Step) -> None:
        """The weights have been updated and the step's numbers reported. May still change the weights: validation and
        checkpoint of this step come next."""

    def after_step(self, step: Step) -> None:
        """Everything of the step has been done, validation and checkpoint included."""

    def end(self, end: RunEnd) -> None:
        """The run has ended, well or not; called in reverse order of the parts, also when `start` was not."""


class GarbageCollection(Callback):
    """Collects Python's garbage at fixed steps, the same on all processes, and at no other time: a process that
    collects keeps the others waiting."""

    def __init__(self, freq: int) -> None:
        self.freq = freq

    @classmethod
    def of(cls, run: Run) -> GarbageCollection | None:
        freq = run.config.training.gc_freq
        return cls(freq) if freq else None

    def start(self) -> None:
        gc.disable()

    def after_step(self, step: Step) -> None:
        if step.number % self.freq == 0:
            gc.collect(1)

    def end(self, end: RunEnd) -> None:
        gc.enable()
