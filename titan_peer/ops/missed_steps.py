"""What the steps in which a table row had no gradient have done to it under dense AdamW, in closed form.

A row that was last updated in step s and is updated again in step t has missed n = t - 1 - s steps. In each of them the
gradient is zero: AdamW multiplies the moments by beta1 and beta2, so its update shrinks by r = beta1 / sqrt(beta2), and
the weight decays by d = 1 - lr * weight_decay. Together, with u = m / (sqrt(v) + eps) from the moments after step s,

    m <- beta1^n m,    v <- beta2^n v,    w <- d^n w - lr u S(n),    S(n) = sum over i = 1..n of d^(n-i) r^i
                                                                          = r (d^n - r^n) / (d - r)

This is applied when the row is next updated, in the same pass over it, so that the cost follows the rows in use. It is
dense AdamW's result if rate and bias correction were the same in the missed steps as in the step that makes them good,
and eps is small beside sqrt(v).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-9  # of a first update, what is left of it at the end of the table
MOST_RATIO = 0.9999
"""The largest beta1 / sqrt(beta2): with larger ones an unused row would move for hundreds of thousands of steps, and
from 1 on for ever. (0.9999^2 = 0.9998 is checked in a job's configuration, which has no access to this file.)"""


def shrinkage(beta1: float, beta2: float) -> float:
    """r, what one missed step leaves of AdamW's update."""
    if beta1 == 0:
        return 0.0
    return beta1 / math.sqrt(beta2) if beta2 else math.inf


@dataclass(frozen=True)
class MissedSteps:
    """Which steps the rows of a table have missed, and how these are made good in one step of the table."""

    last_use: Tensor
    """int32 [N]: the step in which a row was last updated, 0 for never; the update sets it."""
    step: int
    """The number of the step that is now made, from 1 on."""
    beta1: float
    beta2: float
    decay: float
    """d, what one step of weight decay leaves of a weight."""

    def __post_init__(self) -> None:
        ratio = shrinkage(self.beta1, self.beta2)
        if not (ratio <= MOST_RATIO and 0 < self.decay <= 1):
            raise ValueError(
                f"missed steps: beta1 / sqrt(beta2) = {ratio:g} must be at most {MOST_RATIO}, and "
                f"1 - lr * weight_decay = {self.decay:g} above 0 and at most 1"
            )

    def count(self, rows: Tensor) -> Tensor:
        """Steps that rows [R] have missed, int64 [R]."""
        return self.step - 1 - self.last_use[rows].long()

    def factors(self, missed: Tensor) -> Tensor:
        """beta1^n, beta2^n, d^n and S(n) for int64 [R]; float64 [R, 4]."""
        return _factors(missed, self.beta1, self.beta2, self.decay)

    def table(self) -> Tensor:
        """float32 [W, 4] on the device of last_use: the factors of n = 0..W-1 missed steps. For the kernels, which take
        a row with n > W - 1 through W - 1 of its steps by the table, where its momentum has died away, and through the
        others by powers."""
        return _table(self.beta1, self.beta2, self.decay, self.last_use.device)

    def log2(self) -> tuple[float, float, float]:
        """Of beta1, beta2 and d: powers are exp2(n * log2). For zero, a number whose power is zero as well."""
        beta1, beta2, decay = (math.log2(max(x, 2.0**-140)) for x in (self.beta1, self.beta2, self.decay))
        return beta1, beta2, decay


def _factors(missed: Tensor, beta1: float, beta2: float, decay: float) -> Tensor:
    n = missed.double()
    r = shrinkage(beta1, beta2)
    # S / r is symmetric in d and r: large^(n-1) (1 - q^n) / (1 - q) with q = small / large, which for q near 1 must not
    # be computed as a difference
    large, small = max(decay, r), min(decay, r)
    log_q = math.log(small / large) if small else -math.inf
    series = torch.expm1(n * log_q) / math.expm1(log_q) if log_q else n
    moved = torch.where(missed > 0, r * large ** (n - 1) * series, 0.0)
    return torch.stack([beta1**n, beta2**n, decay**n, moved], dim=1)


@lru_cache(maxsize=8)
def _table(beta1: float, beta2: float, decay: float, device: torch.device) -> Tensor:
    r = shrinkage(beta1, beta2)
    length = 2 + math.ceil(math.log(_NEGLIGIBLE) / math.log(r)) if r else 2
    # made on the device: a copy to it would make the host wait
    return _factors(torch.arange(length, device=device), beta1, beta2, decay).float()
