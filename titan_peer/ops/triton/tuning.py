"""How kernels are launched: block sizes and warps per problem, from a tuning file or else by rule.

A problem is (kernel, D, K, E, dtype, whether the table fits the device's cache). `titan-peer tune` measures candidates
and writes the fastest into a JSON file in the cache folder (TITAN_PEER_CACHE_DIR), per device; the file is optional.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from titan_peer.ops.cpu.build import cache_folder

logger = logging.getLogger("titan_peer")

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run as numpy code, on CPU tensors."""

_L2_WITHOUT_A_GPU = 32 << 20


class Problem(NamedTuple):
    """What a launch depends on; the key of the tuning file."""

    kernel: str
    """experts_forward, experts_backward, table_gradient, row_norm, adamw, normalized or best_sub_keys."""
    D: int
    """Numbers per row: the model dim, or the dim of a sub-key."""
    K: int
    """Places per token: heads x k (for table kernels on sub-keys: k of one head)."""
    E: int
    dtype: torch.dtype
    """The table's dtype."""
    in_cache: bool
    """Whether the table fits into the device's L2 cache."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} D={self.D} K={self.K} E={self.E} {dtype} {'cache' if self.in_cache else 'memory'}"


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel."""

    block: int
    """Rows (experts_*), pairs (table_gradient, row_norm, adamw) or queries (best_sub_keys) per program at a time."""
    num_warps: int
    num_stages: int = 1
    """Iterations whose loads are in flight (experts_*): above 1 the compiler copies ahead into shared memory."""
    variant: str = ""
    """table_gradient: sorted or atomic; best_sub_keys: tiles or matmul. Empty: the launcher's rule."""


def problem(kernel: str, table: Tensor, K: int, E: int, D: int) -> Problem:
    l2 = _device_properties(table.device).l2_bytes
    return Problem(kernel, D, K, E, table.dtype, table.numel() * table.element_size() <= l2)


class _Device(NamedTuple):
    name: str
    num_sms: int
    l2_bytes: int


@functools.cache
def _device_properties(device: torch.device) -> _Device:
    if device.type != "cuda":
        return _Device("interpreter", 1, _L2_WITHOUT_A_GPU)
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.name, properties.multi_processor_count, properties.L2_cache_size)


def num_programs(device: torch.device, num_warps: int, most: int) -> int:
    """Programs of a persistent kernel: 32 warps per multiprocessor, at most one program per unit of work."""
    return max(1, min(most, _device_properties(device).num_sms * max(1, 32 // num_warps)))


def num_splits(device: torch.device, programs: int, most: int) -> int:
    """Into how many parts the work of `programs` programs is cut so that there are four programs per multiprocessor."""
    wanted = 4 * _device_properties(device).num_sms
    return max(1, min(most, triton.next_power_of_2(triton.cdiv(wanted, max(programs, 1)))))


# ---- by rule


def _warps_for(D: int, element_size: int) -> int:
    """Enough warps, up to eight, for each thread to load 16 bytes of a row."""
    return max(1, min(8, triton.next_power_of_2(D) * element_size // (16 * 32)))


def by_rule(p: Problem) -> Launch:
    """A launch that needs no tuning run."""
    width = triton.next_power_of_2(p.D)
    if p.kernel.startswith("experts_"):
        # 8 KiB of each table in flight per program: with about ten programs per multiprocessor far more than latency
        # needs
        block = max(1, min(8, 8192 // (width * p.dtype.itemsize), triton.next_power_of_2(p.K * p.E)))
        return Launch(block, _warps_for(p.D, p.dtype.itemsize))
    if p.kernel == "best_sub_keys":
        return Launch(64 if width * p.dtype.itemsize <= 256 else 32, 4)
    # Table kernels are built for steps in which half of the touched rows are used twice or more.
    block = 4 if width > 256 else 8
    return Launch(block, max(1, min(8, width // 256)))


def candidates(p: Problem) -> list[Launch]:
    """What a tuning run tries: launches near the rule's, and the other variants."""
    rule = by_rule(p)
    if p.kernel == "best_sub_keys":
        tiles = ((32, 2), (32, 4), (64, 4), (64, 8), (128, 8))
        return [Launch(1, 1, variant="matmul"), *(Launch(*tile, variant="tiles") for tile in tiles)]
    blocks = sorted({max(1, rule.block // 2), rule.block, rule.block * 2})
    warps = sorted({max(1, rule.num_warps // 2), rule.num_warps, min(16, rule.num_warps * 2)})
    if p.kernel.startswith("experts_"):
        return [Launch(b, w, stages) for b in blocks for w in warps for stages in (1, 2)]
    if p.kernel == "table_gradient":
        return [Launch(1, 4, variant="atomic"), *(Launch(b, w, variant="sorted") for b in blocks for w in warps)]
    return [Launch(b, w) for b in blocks for w in warps]


# ---- from the tuning file

_forced: dict[Problem, Launch] = {}


@contextmanager
def forced(p: Problem, launch: Launch) -> Iterator[None]:
    """Launch a problem this way, regardless of the rule and the tuning file."""
    _forced[p] = launch
    try:
        yield
    finally:
        del _forced[p]


def tuning_file() -> Path:
    return cache_folder() / "triton-tuning.json"


def _section(device: torch.device) -> str:
    return f"{_device_properties(device).name}, triton {triton.__version__}"


def _read(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): kernels are launched by rule", path, error)
        return {}


@functools.cache
def _tuned(device: torch.device) -> dict[str, Launch]:
    path, found = tuning_file(), {}
    for key, launch in _read(path).get(_section(device), {}).items():
        try:
            found[key] = Launch(**launch)  # type: ignore[arg-type]
        except TypeError:
            logger.warning("%s: %s is not a launch and is ignored", path, key)
    return found


def launch_for(p: Problem, device: torch.device) -> Launch:
    return _forced.get(p) or _tuned(device).get(str(p)) or _cached_rule(p)


_cached_rule = functools.lru_cache(maxsize=256)(by_rule)


def is_tuned(device: torch.device) -> bool:
    return bool(_tuned(device))


def save(best: dict[Problem, Launch], device: torch.device) -> Path:
    """Add launches to the tuning file, which is replaced as a whole; later launches of this process use them."""
    path = tuning_file()
    content = _read(path)
    content.setdefault(_section(device), {}).update({str(p): asdict(launch) for p, launch in best.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as scratch:
        json.dump(content, scratch, indent=1)
    Path(scratch.name).replace(path)
    _tuned.cache_clear()
    return path
