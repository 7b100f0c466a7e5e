"""The numbers that are reported with a training step, on the console's record and in every sink.

A new one is a function of `ReportedStep` in STEP_METRICS. What has its own intervals, plots or state is a callback
instead (callback.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from titan_peer.common.host_memory import peak_resident_bytes

# Dense bf16 peak, FLOP/s, by a part of the device's name (vendors' data sheets).
_PEAK_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: reserved by the allocator on CUDA, the process' resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_resident_bytes() / 2**30


@dataclass(frozen=True)
class ReportedStep:
    """What the numbers of a step are computed from, on every process."""

    model: nn.Module
    """After the step's update; parameters may be sharded over processes (DTensor)."""
    device: torch.device
    loss: float
    grad_norm: float
    lr: float
    tokens_seen: int
    """Tokens of all processes since the first step of the job."""
    steps: int
    """Steps since the last report, and their tokens (of all processes) and seconds."""
    tokens: int
    seconds: float
    elapsed_seconds: float
    flops_per_second: float | None
    """Peak of all devices together; None if unknown."""
    flops_per_token: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps


def _mfu(step: ReportedStep) -> float | None:
    """Model FLOPs utilisation: the model's own FLOPs per second as a share of the devices' peak."""
    if step.flops_per_second is None:
        return None
    return round(step.tokens_per_second * step.flops_per_token / step.flops_per_second, 5)


STEP_METRICS: dict[str, Callable[[ReportedStep], float | None]] = {
    "loss": lambda step: step.loss,
    "grad_norm": lambda step: step.grad_norm,
    "lr": lambda step: step.lr,
    "tokens_per_second": lambda step: round(step.tokens_per_second, 1),
    "tokens_seen": lambda step: step.tokens_seen,
    "seconds_per_step": lambda step: round(step.seconds_per_step, 4),
    "peak_memory_gib": lambda step: round(peak_memory_gib(step.device), 3),
    "elapsed_seconds": lambda step: round(step.elapsed_seconds, 2),
    "mfu": _mfu,
}
"""Name -> function; None leaves the number out. Every process calls all of them in this order at every report, so they
may communicate; the first process writes the values."""


def step_metrics(step: ReportedStep) -> dict[str, float]:
    """The numbers of a step by name."""
    values = {name: compute(step) for name, compute in STEP_METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}
