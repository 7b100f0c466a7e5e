"""Which recipe makes the best model for the same compute? The same text, batches, tokens and FLOPs per token.

Trains, on the three corpora of scripts/fetch_corpora.py and a vocabulary of 4,096: a dense model with AdamW, as it was
before; a dense model with Muon and embedding norm; the same with PEER in half of the blocks at equal FLOPs; and, if its
path is given, nanochat's own model and optimizer on the same batches, with its own rules. Reports validation loss
against tokens and against seconds. Runs are resumed: what is done is not repeated. One thread per run, `--jobs` runs at a
time; seconds compare only runs that shared the machine in the same way.

Examples:
    python scripts/fetch_corpora.py
    python benchmarks/recipe.py --jobs 2
    git clone https://github.com/karpathy/nanochat && python benchmarks/recipe.py --nanochat nanochat --seeds 0 1
    python benchmarks/recipe.py --steps 20 --designs dense_muon --output /tmp/trial --folder /tmp/trial
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import RESULTS, markdown_table, write_results

from titan_peer.common.command_line import FlagParser

ROOT = Path(__file__).resolve().parent.parent
MUON = {"optimizer.name": "muon", "optimizer.lr": 6e-3, "model.embedding_norm": True, "model.zero_init_outputs": True}
PEER = {"model.peer_layers": [1, 3], "model.peer.num_heads": 8, "model.ffn_hidden_dim": 1080}  # 27.8 MFLOPs; dense 27.9
DESIGNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense_adamw": ("dense, AdamW 1e-3 (the best of four rates)", {"optimizer.lr": 1e-3}),
    "dense_muon": ("dense, Muon 6e-3, embedding norm", MUON),
    "peer_muon": ("PEER in 2 of 4 blocks, Muon 6e-3, embedding norm", MUON | PEER),
}


def job(options: argparse.Namespace, settings: dict[str, Any], seed: int, folder: Path) -> list[str]:
    """The arguments of one training run."""
    keys = {
        "training.steps": options.steps,
        "lr_scheduler.warmup_steps": max(options.steps // 30, 1),
        "validation.freq": max(options.steps // 4, 1),
        "debug.seed": seed,
        "job.dump_folder": folder,
        "checkpoint.interval": max(options.steps // 4, 1),
        **settings,
    }
    words = ["--job.config_file", str(ROOT / "benchmarks/recipe.toml")]
    for key, value in keys.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train(options: argparse.Namespace, name: str, seed: int) -> None:
    """Train a design, unless it is done."""
    folder = options.folder / f"{name}-{options.steps}-{seed}"
    if last_validation(folder)[0] >= options.steps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if name == "nanochat":
        arguments = [str(ROOT / "benchmarks/recipe_nanochat.py"), str(options.nanochat), str(options.nanochat_scale)]
        arguments += job(options, {}, seed, folder)
    else:
        arguments = ["-m", "titan_peer.train", *job(options, DESIGNS[name][1], seed, folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w", encoding="utf-8") as log:
        print(f"{name}, seed {seed}: log in {folder / 'log'}", flush=True)
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}: ended with status {done.returncode}; see {folder / 'log'}")


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def last_validation(folder: Path) -> tuple[int, float]:
    """(step, loss) of the last validation; (0, nan) without any."""
    found = [(record["step"], record["validation_loss"]) for record in records(folder) if "validation_loss" in record]
    return found[-1] if found else (0, float("nan"))


def curve(folder: Path) -> list[dict[str, float]]:
    """Tokens, training seconds and validation loss of each validation."""
    points, seconds, tokens = [], 0.0, 0
    for record in records(folder):
        if "elapsed_seconds" in record:
            seconds, tokens = record["elapsed_seconds"], record["tokens_seen"]
        if "validation_loss" in record:
            points.append({"tokens": tokens, "seconds": seconds, "loss": record["validation_loss"]})
    return points


def plot(curves: dict[str, list[list[dict[str, float]]]], output: Path) -> None:
    """Loss against tokens and against seconds; a line per run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds")):
        for i, (label, runs) in enumerate(curves.items()):
            for run in runs:
                places, losses = [point[quantity] for point in run], [point["loss"] for point in run]
                axes.plot(places, losses, f"C{i}o-", markersize=4, label=label if run is runs[0] else None)
        axes.set(xlabel=quantity, ylabel="validation loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="of 8 x 256 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--designs", nargs="+", choices=[*DESIGNS], default=[*DESIGNS])
    parser.add_argument("--nanochat", type=Path, help="a clone of nanochat; its model and optimizer are trained too")
    parser.add_argument("--nanochat_scale", type=float, default=0.25, help="factor on all of its learning rates")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/recipe", help="of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    names = [*options.designs, *(["nanochat"] if options.nanochat else [])]
    labels = {name: label for name, (label, _) in DESIGNS.items()}
    labels["nanochat"] = f"nanochat's model and optimizer, its rates x {options.nanochat_scale:g}"
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(train, options, name, seed) for name in names for seed in options.seeds]:
            future.result()

    curves = {n: [curve(options.folder / f"{n}-{options.steps}-{seed}") for seed in options.seeds] for n in names}
    rows = []
    for name in names:
        losses = [run[-1]["loss"] for run in curves[name]]
        seconds = [run[-1]["seconds"] for run in curves[name]]
        spread = f" ± {max(losses) - min(losses):.4f}" if len(losses) > 1 else ""
        rows.append([labels[name], f"{sum(losses) / len(losses):.4f}{spread}", f"{sum(seconds) / len(seconds):,.0f}"])
    conditions = (
        f"{options.steps} steps of 8 x 256 tokens, seeds {', '.join(map(str, options.seeds))} (±: the largest difference "
        f"between seeds), {options.jobs} runs at a time with one thread each."
    )
    table = markdown_table(["design", "validation loss", "seconds of training"], rows)
    text = f"{conditions}\n\n{table}"
    stem = write_results(f"recipe-{options.steps}-steps", "cpu", text, {"curves": curves}, options.output)
    plot({labels[name]: runs for name, runs in curves.items()}, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
