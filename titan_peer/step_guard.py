"""Which steps to skip: those that would spoil the weights and the optimizer's moments.

A step is bad if its loss or the norm of its gradient is not finite, or if the norm is far above what it has been of late.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titan_peer.config.job import Training

WINDOW = 128
"""Steps whose norms say what is usual."""
FEWEST = 16
"""Norms that must be known before one can be called far above the others."""


class StepGuard:
    """Judges the steps of one job, in their order.

    `norms` are those of the last `WINDOW` steps with a finite one, skipped steps included: where the norm has risen for
    good, its median follows.

    Args:
        sum_over_processes: by which all processes agree.
    """

    def __init__(self, training: Training, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        self.most_in_a_row, self.factor = training.skip_bad_steps, training.bad_step_norm_factor
        self.sum_over_processes = sum_over_processes
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = self.in_a_row = 0
        self.why = ""
        """Why the last step was bad; empty if it was not."""

    def allows(self, loss_sum: Tensor, grad_norm: Tensor) -> bool:
        """Whether a step may update the weights, as all processes agree.

        Args:
            loss_sum: of this process, 0-d.
            grad_norm: of the whole gradient, 0-d.
        """
        norm = grad_norm.item()
        self.why = self._why_bad(loss_sum.item(), norm)
        votes = self.sum_over_processes(torch.tensor(float(bool(self.why)), dtype=torch.float64))
        if votes > 0 and not self.why:
            self.why = "the loss is not finite on another process"
        if math.isfinite(norm):
            self.norms.append(norm)
        self.in_a_row = self.in_a_row + 1 if self.why else 0
        self.skipped += bool(self.why)
        return not self.why

    def _why_bad(self, loss_sum: float, norm: float) -> str:
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            return f"sum of losses = {loss_sum}, gradient norm = {norm}"
        if self.factor and len(self.norms) >= FEWEST:
            usual = statistics.median(self.norms)
            if norm > self.factor * usual:
                return f"gradient norm = {norm:.4g}, {norm / usual:.1f} times the median of {len(self.norms)} steps"
        return ""

    def told(self) -> str:
        """In words, why the last step was bad and how many were."""
        return f"{self.why} ({self.in_a_row} in a row, {self.skipped} in all)"

    @property
    def must_end(self) -> bool:
        """More steps in a row were bad than the job allows."""
        return self.in_a_row > self.most_in_a_row

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def not_finite(model: nn.Module) -> str:
    """The parameters that are not finite, in words: the first of them and how many more."""
    names = [name for name, p in model.named_parameters() if not torch.isfinite(p.detach().sum()).item()]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
