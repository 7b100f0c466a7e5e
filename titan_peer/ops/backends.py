"""Which implementation serves which device. Every backend module has `reference`'s functions, with equal names and
shapes."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from titan_peer.common.errors import UserError
from titan_peer.ops import reference, shapes

logger = logging.getLogger("titan_peer")

BACKENDS = ("auto", "reference", "cpu", "triton")


@cache
def _choose(device_type: str) -> tuple[ModuleType, str]:
    """The module for a kind of device, and a line that names it and, if it is not the fast one, says why.

    The environment variable TITAN_PEER_BACKEND overrides the device's default.
    """
    wanted = os.environ.get("TITAN_PEER_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise UserError(f"TITAN_PEER_BACKEND = {wanted}: must be one of {', '.join(BACKENDS)}")
    if wanted == "reference":
        return reference, "plain PyTorch, as set by TITAN_PEER_BACKEND = reference"
    if wanted == "cpu" or (wanted == "auto" and device_type == "cpu"):
        module, name, problem = _cpu(device_type)
    else:
        module, name, problem = _triton(device_type)
    if problem is None:
        return module, name
    if wanted != "auto":
        raise UserError(f"TITAN_PEER_BACKEND = {wanted}: {problem}")
    return reference, f"plain PyTorch, several times slower than kernels: {problem}"


def _cpu(device_type: str) -> tuple[ModuleType, str, str | None]:
    from titan_peer.ops import cpu

    problem = cpu.unavailable_reason() if device_type == "cpu" else f"C++ kernels do not run on {device_type}"
    return cpu, cpu.description() if problem is None else "", problem


def _triton(device_type: str) -> tuple[ModuleType, str, str | None]:
    if importlib.util.find_spec("triton") is None:
        return reference, "", "Triton is not installed (pip install 'triton>=3.6')"
    from titan_peer.ops import triton

    problem = triton.unavailable_reason(device_type)
    return triton, triton.description() if problem is None else "", problem


def backend_report(device: torch.device) -> str:
    """One line: which path runs the expert operators on `device`, and why if it is not the fast one."""
    return _choose(device.type)[1]


def backend_for(*tensors: Tensor) -> ModuleType:
    """The module whose functions serve these tensors: `shapes` for a dry run's fake tensors, `reference` for
    float64."""
    if any(isinstance(t, FakeTensor) for t in tensors):
        return shapes
    if any(t.dtype == torch.float64 for t in tensors):
        return reference
    return _choose(tensors[0].device.type)[0]
