"""How much time does counting experts take? The same job with and without counting, in alternating steps of one process.

The benchmark times whole optimizer steps of two trainers with the same batches, of which one counts; then it times a
report, and its plots. The time of a report, divided by metrics.expert_usage_freq, is its share of a step.

Examples:
    python benchmarks/expert_usage.py
    python benchmarks/expert_usage.py --config train_configs/peer_small.toml --steps 20 --output /tmp/trial
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from report import RESULTS, markdown_table, median_ms, synchronize, write_results

from titan_peer.common.command_line import FlagParser
from titan_peer.common.host_memory import keep_freed_memory
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.experts.plots import draw
from titan_peer.experts.report import UsageReporter
from titan_peer.experts.usage import count_experts
from titan_peer.model import peer_layers
from titan_peer.trainer import Trainer


def trainer(options: argparse.Namespace, folder: Path, count: bool) -> Trainer:
    arguments = ["--job.config_file", options.config, "--job.dump_folder", str(folder), "--checkpoint.enable", "false"]
    arguments += ["--validation.enable", "false", "--metrics.log_expert_usage", str(count).lower()]
    config = load_config([*arguments, *options.job])
    return Trainer(config, init_world(config.parallelism))


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


@dataclass
class Report:
    """Further costs of counting, in seconds."""

    operator: float
    """The counting operator in all micro-batches and layers of a step."""
    report: float
    plots: float


def time_steps(pair: dict[bool, Trainer], warmup: int, steps: int) -> dict[bool, list[float]]:
    """Seconds of each step without and with counting; the two alternate."""
    batches = {count: iter(one.loader) for count, one in pair.items()}
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(warmup + steps):
        for count in (False, True) if step % 2 else (True, False):  # neither is always the first
            one = pair[count]
            one.model.train()
            one.step += 1
            synchronize(one.device.type)
            start = time.perf_counter()
            one.train_step(batches[count])
            synchronize(one.device.type)
            if step >= warmup:
                times[count].append(time.perf_counter() - start)
    return times


def time_reports(counting: Trainer) -> Report:
    (reporter,) = (part for part in counting.callbacks if isinstance(part, UsageReporter))
    reporter._drawing_seconds = float("inf")  # first without plots
    start = time.perf_counter()
    reporter.report(counting.step)
    report = time.perf_counter() - start
    start = time.perf_counter()
    draw(reporter.folder / "expert_usage.jsonl", reporter.folder)
    plots = time.perf_counter() - start

    training, peer, device = counting.config.training, counting.config.model.peer, counting.device
    places = (training.local_batch_size * training.seq_len, peer.num_heads, peer.num_experts_per_tok)
    # random experts: the worst case for the caches
    indices, gates = torch.randint(peer.num_experts, places, device=device), torch.rand(places, device=device)
    counts = torch.zeros(peer.num_heads, peer.num_experts, dtype=torch.int32, device=device)
    sums = torch.zeros(peer.num_heads, peer.num_experts, device=device)
    one_call = median_ms(lambda _: count_experts(counts, sums, indices, gates), device.type, repeats=30)
    calls = len(list(peer_layers(counting.model))) * counting.accumulation_steps
    return Report(one_call * calls / 1e3, report, plots)


def table(times: dict[bool, list[float]], found: Report, layers: int, freq: int) -> str:
    medians = [statistics.median(times[count]) for count in (False, True)]
    quick = [statistics.quantiles(times[count], n=10)[0] for count in (False, True)]
    ratios = [with_it / without for without, with_it in zip(times[False], times[True])]  # neighbours in time
    low, middle, high = statistics.quantiles(ratios, n=4)
    off = quick[0]
    rows = [
        ["step without counting", *(f"{1e3 * t:.1f} ms" for t in (medians[0], quick[0])), ""],
        [
            "step with counting",
            *(f"{1e3 * t:.1f} ms" for t in (medians[1], quick[1])),
            f"{_percent(medians[1] / medians[0])}, {_percent(quick[1] / quick[0])}",
        ],
        [
            "step with counting compared with its neighbour: median (quartiles)",
            "",
            "",
            f"{_percent(middle)} ({_percent(low)} to {_percent(high)})",
        ],
        [
            f"the counting operator alone, {layers} layers",
            f"{1e3 * found.operator:.2f} ms",
            "",
            f"{100 * found.operator / off:+.2f} %",
        ],
        [
            f"report, every {freq} steps",
            f"{1e3 * found.report:.1f} ms",
            "",
            f"{100 * found.report / freq / off:+.3f} %",
        ],
        ["plots, limited to 0.5 % of the time", f"{1e3 * found.plots:.0f} ms", "", "at most +0.5 %"],
    ]
    return markdown_table(["", "time (steps: median)", "tenth percentile", "share of a step"], rows)


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--config", default="train_configs/debug_model.toml")
    parser.add_argument("--steps", type=int, default=60, help="steps of each trainer, after the warmup")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("job", nargs="*", help="more keys of the job, after --")
    options = parser.parse_args()
    keep_freed_memory()  # as training does

    with tempfile.TemporaryDirectory() as scratch:
        pair = {count: trainer(options, Path(scratch) / str(count), count) for count in (False, True)}
        times = time_steps(pair, options.warmup, options.steps)
        found = time_reports(pair[True])
    counting = pair[True]
    peer, training = counting.config.model.peer, counting.config.training
    layers = len(list(peer_layers(counting.model)))
    setting = (
        f"{options.config} {' '.join(options.job)}: {layers} PEER layers of {peer.num_experts:,} experts, {peer.num_heads} heads "
        f"x {peer.num_experts_per_tok} experts per token, {training.global_batch_size} x {training.seq_len} tokens per step, "
        f"compile {counting.config.compile.enable}; {options.steps} steps each, alternating"
    )
    text = f"{setting}.\n\n{table(times, found, layers, counting.config.metrics.expert_usage_freq)}"
    data = {"setting": setting, "seconds_without": times[False], "seconds_with": times[True]}
    name = f"expert-usage-{Path(options.config).stem}"
    write_results(
        name, counting.device.type, text, data | {"report": found.report, "plots": found.plots}, options.output
    )
    print(text)


if __name__ == "__main__":
    main()
