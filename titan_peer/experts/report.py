"""Reports of expert usage for a person: records, plots and warnings, at intervals of a training run."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

import torch

from titan_peer.common.errors import os_failure
from titan_peer.config.job import JobConfig
from titan_peer.dump_folder import EXPERT_USAGE
from titan_peer.experts.usage import ExpertUsage, LayerUsage, layer_usage
from titan_peer.metrics.callback import Callback, Run, RunEnd, Step
from titan_peer.metrics.sinks import JsonlSink, Record

logger = logging.getLogger("titan_peer")

HOT_LOAD, HOT_COUNT = 100.0, 100
"""Warn about an expert with this many times the uniform share of the gates and this many uses in the window."""
DEAD_SHARE = 0.05
"""Warn when this share of a layer's experts is dead."""
_WORSE = 1.5
"""Warn again when the value has become worse by this factor."""
_PLOT_TIME_SHARE = 0.005
"""The largest share of the time that drawing plots may take; they are always drawn at the end."""


def remedies(config: JobConfig) -> dict[str, str]:
    """What a job could try against a "hot" expert and against "dead" ones; without what it does already."""
    training = config.training
    balance = "training.expert_balance_coeff = 0.01"
    if training.expert_balance_coeff:
        balance = f"a larger training.expert_balance_coeff than {training.expert_balance_coeff:g}"
    common = [balance]
    if config.model.peer.query_norm != "batch":
        common.append('model.peer.query_norm = "batch"')
    common.append(f"a lower optimizer.lr than {config.optimizer.lr:g}")
    freq = min(1000, max(training.steps // 10, 1))
    revival = [] if training.reinit_dead_experts_freq else [f"training.reinit_dead_experts_freq = {freq}"]
    return {kind: "try " + " or ".join(found) for kind, found in (("hot", common), ("dead", [*revival, *common]))}


class UsageReporter(Callback):
    """Reports a training run's expert usage: scalars and histograms to every sink, details to expert_usage.jsonl,
    plots.

    The last step is always reported.
    """

    def __init__(self, run: Run) -> None:
        self.usage = ExpertUsage(run.model)
        self.metrics, self.folder = run.metrics, run.dump_folder / EXPERT_USAGE
        self.freq, self.total_steps = run.config.metrics.expert_usage_freq, run.config.training.steps
        self.remedies = remedies(run.config)
        self._file: JsonlSink | None = None
        if run.world.is_first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise os_failure(f"{self.folder}: cannot be made", error) from None
            self._file = JsonlSink(self.folder / "expert_usage.jsonl", run.resumed_step)
        self._reported = run.resumed_step
        self._warned: dict[tuple[int, str], float] = {}
        self._drawn_at, self._drawing_seconds = time.perf_counter(), 0.0

    @classmethod
    def of(cls, run: Run) -> UsageReporter | None:
        return cls(run) if run.config.metrics.log_expert_usage else None

    def after_update(self, step: Step) -> None:
        if self.due(step.number):
            self.report(step.number)

    def end(self, end: RunEnd) -> None:
        self.close(end.step if end.together else None)

    def due(self, step: int) -> bool:
        return step % self.freq == 0 or step == self.total_steps

    @torch.no_grad()
    def report(self, step: int) -> None:
        """Read and report the window that ends with `step`. Every process must call it."""
        start, self._reported = time.perf_counter(), step
        window = self.usage.read()
        if self._file is not None:
            layers = [layer_usage(layer, counts) for layer, counts in window.items()]
            self._write(step, layers)
            for line in self._warnings(layers):
                self.metrics.print(line)
            elapsed = time.perf_counter() - self._drawn_at
            if step == self.total_steps or self._drawing_seconds <= _PLOT_TIME_SHARE * elapsed:
                self._draw(step)
        self.metrics.exclude(time.perf_counter() - start)

    def close(self, step: int | None) -> None:
        """End with `step`, at which the job may have stopped early, and report the last window. Every process must call
        it.

        None: a process has failed; nothing more is reported, since reporting needs all of them.
        """
        if step is not None and step > self._reported:
            self.report(step)
        if self._file is not None:
            self._file.close()

    def _write(self, step: int, layers: Sequence[LayerUsage]) -> None:
        assert self._file is not None
        scalars: Record = {"step": step}
        for usage in layers:
            scalars |= {name: round(value, 6) for name, value in usage.scalars().items()}
        self.metrics.log_record(scalars)
        for usage in layers:
            self.metrics.log_histogram(step, f"expert_usage/layer_{usage.layer}/load", usage.histogram)
            self._file.write({"step": step, **dataclasses.asdict(usage)})
            self.metrics.print(
                f"step {step:>6}  layer {usage.layer}: {100 * usage.whole.share_used:.1f}% of experts used, unevenness "
                f"{usage.whole.unevenness:.3f}, Gini {usage.whole.gini:.3f}, {usage.dead:,} dead, hottest "
                f"{usage.hot[0].expert} with {usage.hot[0].load:.1f} x the uniform share"
            )

    def _warnings(self, layers: Sequence[LayerUsage]) -> list[str]:
        lines = []
        for usage in layers:
            hottest, dead_share = usage.hot[0], usage.dead / usage.num_experts
            if hottest.count >= HOT_COUNT and self._is_news(usage.layer, "hot", hottest.load, HOT_LOAD):
                lines.append(
                    f"warning: layer {usage.layer}: expert {hottest.expert} has {hottest.load:.0f} x the uniform share of "
                    f"gates; {self.remedies['hot']}"
                )
            if self._is_news(usage.layer, "dead", dead_share, DEAD_SHARE):
                lines.append(
                    f"warning: layer {usage.layer}: {usage.dead:,} of {usage.num_experts:,} experts "
                    f"({100 * dead_share:.0f}%) are dead; {self.remedies['dead']}"
                )
        return lines

    def _is_news(self, layer: int, kind: str, value: float, threshold: float) -> bool:
        if value < self._warned.get((layer, kind), threshold):
            return False
        self._warned[layer, kind] = value * _WORSE
        return True

    def _draw(self, step: int) -> None:
        from titan_peer.experts.plots import draw  # matplotlib takes a second to import

        start = time.perf_counter()
        try:
            for name, png in draw(self.folder / "expert_usage.jsonl", self.folder).items():
                self.metrics.log_image(step, f"expert_usage/{name}", png)
        except OSError as error:  # a full disk must not end the training
            logger.error("the plots of expert usage could not be written: %s", error)
        self._drawn_at = time.perf_counter()
        self._drawing_seconds = self._drawn_at - start
