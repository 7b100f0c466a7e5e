"""Which implementation serves which device. Every backend module has the functions of `reference`, same names and shapes."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from titan_peer.ops import reference

logger = logging.getLogger("titan_peer")


@cache
def _choose(device_type: str) -> tuple[ModuleType, str]:
    if device_type == "cpu":
        from titan_peer.ops import cpu

        problem = cpu.unavailable_reason()
        if problem is None:
            return cpu, f"C++ kernels ({torch.get_num_threads()} threads)"
        return reference, f"plain PyTorch, several times slower than the C++ kernels: {problem}"
    return reference, f"plain PyTorch: there are no kernels for {device_type}"


def backend_report(device: torch.device) -> str:
    """One line: which path runs the expert operators on `device`, and why if it is not the fast one."""
    return _choose(device.type)[1]


def backend_for(*tensors: Tensor) -> ModuleType:
    """The module whose functions serve these tensors; float64 always takes the reference."""
    if any(t.dtype == torch.float64 for t in tensors):
        return reference
    return _choose(tensors[0].device.type)[0]
