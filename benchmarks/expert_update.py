"""Is the row-wise AdamW of expert tables as good as the dense one? Both train the same model on the same batches.

The benchmark trains the debug job with more experts than a step can touch, once per variant and learning-rate factor of
the tables, and compares training and validation loss. It varies the factor because the same learning rate has different
effects: under the dense update, the remaining first moment of a row continues to change it for some steps after its use
(for a rarely used row, by several times the learning rate in total); under the row-wise update, each use changes the
row once. Nothing is timed, so the runs may share the machine.

Examples:
    python benchmarks/expert_update.py
    python benchmarks/expert_update.py --batch_size 2 --lr_factors 1 3 6   # far fewer uses per expert
    python benchmarks/expert_update.py --steps 20 --output /tmp/trial
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import RESULTS, device_name, markdown_table, square_number, versions, write_results

from titan_peer.common.command_line import FlagParser

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "dense": ("dense AdamW", ["--optimizer.expert_update", "dense"]),
    "rowwise": ("row-wise AdamW", ["--optimizer.expert_update", "rowwise"]),
    "rowwise_small_state": (
        "row-wise AdamW, bf16 first moment, one second moment per row",
        ["--optimizer.expert_moment_dtype", "bfloat16", "--optimizer.expert_second_moment", "row"],
    ),
}


def label(variant: str, factor: float) -> str:
    return f"{VARIANTS[variant][0]}, rate x {factor:g}"


def job(options: argparse.Namespace, variant: str, factor: float, folder: Path) -> list[str]:
    """The command that trains one variant."""
    side = round(options.experts**0.5)
    settings: dict[str, object] = {
        "job.config_file": ROOT / "train_configs/debug_model.toml",
        "job.dump_folder": folder,
        "model.peer.num_experts": options.experts,
        "training.steps": options.steps,
        "model.dim": options.dim,
        "training.local_batch_size": options.batch_size,
        "training.seq_len": options.seq_len,
        "training.mixed_precision_param": "float32",
        "optimizer.lr": options.lr,
        "optimizer.expert_lr_factor": factor,
        "lr_scheduler.warmup_steps": options.steps // 20,
        "lr_scheduler.decay_ratio": 0.3,
        "checkpoint.enable": "false",
        "metrics.log_freq": 1,
        "validation.freq": max(1, options.steps // 10),
        "validation.steps": 60,
    }
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    words += ["--model.peer.product_key_dim", str(side), str(side)]
    return [sys.executable, "-m", "titan_peer.train", *words, *VARIANTS[variant][1]]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: {r["step"]: r[key] for r in records if key in r} for key in ("loss", "validation_loss")}


def _smooth(values: list[float], window: int) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _plot(found: dict[str, dict[str, dict[int, float]]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, curve in found.items():
        steps = list(curve["loss"])
        window = max(1, len(steps) // 40)
        axes[0].plot(steps, _smooth(list(curve["loss"].values()), window), label=name)
        axes[1].plot(*zip(*curve["validation_loss"].items()), marker="o", label=name)
    axes[0].set(xlabel="step", ylabel="training loss, running mean (nats per token)")
    axes[1].set(xlabel="step", ylabel="validation loss (nats per token)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--experts", type=square_number, default=16384, help="a square number; a step should use only a part of them"
    )
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr_factors", type=float, nargs="+", default=[1.0, 3.0], help="rates of the tables, x --lr")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for table, JSON and plot")
    options = parser.parse_args()

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant, factor in itertools.product(options.variants, options.lr_factors):
            folder = Path(scratch) / f"{variant}-{factor:g}"
            subprocess.run(job(options, variant, factor, folder), check=True, cwd=ROOT)
            found[label(variant, factor)] = curves(folder)

    tail = max(1, options.steps // 20)
    rows, base = [], None
    for name, curve in found.items():
        training = sum(list(curve["loss"].values())[-tail:]) / tail
        validation = list(curve["validation_loss"].values())[-1]
        base = base or validation
        difference = f"{100 * (validation / base - 1):+.2f} %"
        rows.append([name, f"{training:.4f}", f"{validation:.4f}", difference])
    header = [
        "expert tables' update",
        f"training loss, mean of last {tail} steps",
        "validation loss",
        "compared with the first",
    ]
    setting = (
        f"debug model with {options.experts:,} experts per layer, {options.steps:,} steps of "
        f"{options.batch_size} x {options.seq_len} tokens of the bundled text, dim {options.dim}, "
        f"learning rate {options.lr:g}, float32"
    )
    text = f"{setting}.\n\n{markdown_table(header, rows)}"
    stem = write_results("expert-update", "cpu", text, {"setting": setting, "curves": found}, options.output)
    _plot(found, stem.with_suffix(".png"), f"{setting}\n{device_name('cpu')}; {versions()}")
    print(text)


if __name__ == "__main__":
    main()
