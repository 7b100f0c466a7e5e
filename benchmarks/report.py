"""Shared by all benchmarks: the name of the machine, its copy bandwidth, and the output of results."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def square_number(text: str) -> int:
    """A type for argparse: a number of experts that two axes of equal length can have."""
    number = int(text)
    if number < 1 or math.isqrt(number) ** 2 != number:
        side = max(math.isqrt(max(number, 0)), 1)
        raise argparse.ArgumentTypeError(
            f"{number} is not a square number; the nearest are {side**2:,} and {(side + 1) ** 2:,}"
        )
    return number


def device_name(device: str) -> str:
    """Model of the GPU, or of the processor with the number of threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> str:
    return f"torch {torch.__version__}, Python {platform.python_version()}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(run: Callable[[int], object], device: str, repeats: int, warmup: int = 2) -> float:
    """Median milliseconds of run(i); with i the caller can rotate its buffers, so that none is still in cache."""
    times = []
    for i in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        run(i)
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[warmup:])


def copy_bandwidth(device: str, size: int = 1 << 28) -> float:
    """Bytes per second, read and written, of copying one large float32 tensor into another."""
    source, target = torch.ones(size // 4, device=device), torch.zeros(size // 4, device=device)
    return 2 * size / (median_ms(lambda _: target.copy_(source), device, repeats=7) / 1e3)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    lines.insert(1, "| " + " | ".join("---" if i == 0 else "---:" for i in range(len(header))) + " |")
    return "\n".join(lines)


def write_results(name: str, device: str, text: str, data: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `text` as markdown and `data` as JSON; returns the path without suffix, for a plot beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.date.today().isoformat()
    stem = folder / f"{today}-{name}-{device}"
    heading = f"# {name}, {today}\n\n{device_name(device)}; {versions()}.\n\n"
    stem.with_suffix(".md").write_text(heading + text + "\n", encoding="utf-8")
    record = {"date": today, "device": device_name(device), "versions": versions(), **data}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return stem
