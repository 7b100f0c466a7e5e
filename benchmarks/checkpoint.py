"""How long training stops for a checkpoint: saved synchronously on the training thread, or asynchronously.

A job trains real steps on the bundled text and saves every few steps. The benchmark measures the additional time that a
save causes, compared with the median step during which nothing is written: the save call itself, the wait before the
optimizer may change what is being copied, and the slowdown of the following steps while the checkpoint is written.

Examples:
    python benchmarks/checkpoint.py                                  # 65,536 experts per layer: a minute on two CPU cores
    python benchmarks/checkpoint.py --experts 16384 --saves 3
    python benchmarks/checkpoint.py --experts 262144 --dim 512      # larger tables
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, device_name, markdown_table, square_number, versions, write_results

from titan_peer.common.command_line import FlagParser
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


def measure(mode: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each step of a job that saves in `mode`, of its saves and of its waits; and its checkpoint's size."""
    side = round(options.experts**0.5)
    steps = options.interval * (options.saves + 1)
    arguments = {
        "job.config_file": ROOT / "train_configs/debug_model.toml",
        "job.dump_folder": folder,
        "model.dim": options.dim,
        "model.peer.num_experts": side * side,
        "model.peer.product_key_dim": f"{side} {side}",
        "training.steps": steps + 1,
        "training.gc_freq": 0,
        "validation.enable": "false",
        "compile.enable": options.compile,
        "checkpoint.interval": 10**9,
        "checkpoint.keep_latest_k": 1,
        "checkpoint.async_mode": mode,
    }
    config = load_config([word for key, value in arguments.items() for word in (f"--{key}", *str(value).split())])
    os.chdir(ROOT)
    trainer = Trainer(config, init_world(config.parallelism))
    waits: list[float] = []
    wait_until_copied = trainer.checkpointer.wait_until_copied

    def timed_wait() -> None:
        start = time.perf_counter()
        wait_until_copied()
        waits.append(time.perf_counter() - start)

    trainer.checkpointer.wait_until_copied = timed_wait  # type: ignore[method-assign]
    batches = iter(trainer.loader)
    trainer.model.train()
    seconds: list[float] = []
    calls: list[float] = []
    beside: list[bool] = []
    for step in range(1, steps + 1):
        trainer.step = step
        start = time.perf_counter()
        trainer.train_step(batches)
        trained = time.perf_counter()
        if step % options.interval == 0 and step < steps:  # the last interval shows the slowdown after the last save
            trainer.save_checkpoint(last=False, wait=False)
            calls.append(time.perf_counter() - trained)
        seconds.append(trained - start)
        background = trainer.checkpointer._background
        beside.append(background is not None and background.is_running)
    trainer.checkpointer.finish()
    size = sum(path.stat().st_size for path in folder.rglob("*.distcp"))
    return {"seconds": seconds, "calls": calls, "waits": waits, "beside": beside, "bytes": size}


def summary(found: dict[str, Any], interval: int) -> dict[str, float]:
    """Medians per save, in seconds. The first interval and the first save are not counted, because they touch memory for
    the first time."""
    seconds, beside, waits = found["seconds"], found["beside"], found["waits"]
    measured = range(interval, len(seconds))
    step = statistics.median(seconds[i] for i in measured if not beside[i - 1])
    saves = range(2, len(found["calls"]) + 1)
    slowed = []
    for save in saves:
        during = [i for i in range(save * interval, min((save + 1) * interval, len(seconds))) if beside[i - 1]]
        slowed.append(sum(seconds[i] - waits[i] - step for i in during))
    return {
        "step": step,
        "call": statistics.median(found["calls"][1:]),
        "wait": statistics.median(waits[save * interval] for save in saves),
        "slowed": statistics.median(slowed),
    }


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--experts", type=square_number, default=65536, help="experts per layer, a square number; three layers"
    )
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--interval", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--saves", type=int, default=4, help="saves of each kind; the first one is not counted")
    parser.add_argument("--compile", default="true", choices=["true", "false"])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where checkpoints are written (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()

    options.output = options.output.resolve()  # a job runs in the repository's root
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for mode in ("disabled", "async"):
            print(f"{mode}: {options.saves} saves, every {options.interval} steps", file=sys.stderr)
            found[mode] = measure(mode, options, Path(folder) / mode)
            shutil.rmtree(Path(folder) / mode)
    rows = []
    for mode, name in (("disabled", "synchronous"), ("async", "asynchronous")):
        s = summary(found[mode], options.interval)
        stopped = s["call"] + s["wait"]
        columns = (s["step"], s["call"], s["wait"], stopped, s["slowed"], stopped + s["slowed"])
        rows.append([name, *(f"{value:.2f}" for value in columns)])
    gib = found["async"]["bytes"] / 2**30
    header = ["save", "step, s", "save call, s", "wait for the copy, s", "training stops, s"]
    header += ["slowdown of the following steps, s", "total, s"]
    text = f"{options.experts:,} experts per layer, dim {options.dim}: a checkpoint of {gib:.2f} GiB. Per save:\n\n"
    text += markdown_table(header, rows)
    print(f"{device_name(device)}; {versions()}\n\n{text}")
    stem = write_results(
        "checkpoint",
        device,
        text,
        {"options": vars(options) | {"folder": None, "output": None}, **found},
        options.output,
    )
    print(f"\nwritten to {stem}.md", file=sys.stderr)


if __name__ == "__main__":
    main()
