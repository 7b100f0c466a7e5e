"""Validation: the loss on held-out text every few steps, on each set and over all of them."""

from __future__ import annotations

import time

from titan_peer.common.errors import UserError
from titan_peer.data.loader import ValidationLoader
from titan_peer.distributed.collectives import on_all_processes
from titan_peer.metrics.callback import Run
from titan_peer.metrics.held_out_loss import HeldOutLoss


class Validation:
    """The validation of a training run.

    Args:
        loader: this process's share of the held-out sets.
    """

    def __init__(self, run: Run, loader: ValidationLoader) -> None:
        self.run, self.loader, self.settings = run, loader, run.config.validation

    def due(self, step: int) -> bool:
        return step % self.settings.freq == 0

    def validate(self, step: int) -> None:
        """Measure and report mean loss, perplexity and bits per byte, of the weights and of their averages if there are
        any. Called by every process."""
        run = self.run
        run.begin(f"validation after step {step}")
        start = time.perf_counter()
        self._read()
        found, averaged = self._measure(), {}
        if run.optimizers.average is not None:
            with run.optimizers.averaged_weights():
                averaged = self._measure()
        seconds = time.perf_counter() - start
        run.metrics.log_validation(step, sets=found, averaged=averaged, seconds=seconds)
        run.metrics.exclude(seconds)

    def _measure(self) -> dict[str, HeldOutLoss]:
        """The loss of the model as it is, on each set."""
        return {
            name: self.run.held_out_loss(batches, self.settings.steps) for name, batches in self.loader.sets.items()
        }

    def _read(self) -> None:
        """Read the text of this validation, before its first collective: reading may fail on one process only."""
        steps, sets = self.settings.steps, self.loader.sets
        found = on_all_processes(lambda: {name: batches.read_ahead(steps) for name, batches in sets.items()})
        for rank, numbers in enumerate(found):
            if numbers != found[0]:
                raise UserError(
                    f"validation.sources: rank 0 reads {found[0]} batches and rank {rank} {numbers}; "
                    "all processes must see the same files"
                )
