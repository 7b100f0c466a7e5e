"""What does counting experts cost? The same job with and without it, step by step in turns in one process.

Times whole optimizer steps of two trainers that see the same batches, one of them counting; then reports, without and with
plots. A report's share of a step is its time over metrics.expert_usage_freq steps.

Examples:
    python benchmarks/expert_usage.py
    python benchmarks/expert_usage.py --config train_configs/peer_small.toml --steps 20 --output /tmp/trial
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from report import RESULTS, markdown_table, median_ms, synchronize, write_results

from titan_peer.common.command_line import FlagParser
from titan_peer.common.host_memory import keep_freed_memory
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.experts.plots import draw
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


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--config", default="train_configs/debug_model.toml")
    parser.add_argument("--steps", type=int, default=60, help="of each trainer, after the warmup")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("job", nargs="*", help="more keys of the job, after --")
    options = parser.parse_args()
    keep_freed_memory()  # as train.main does

    with tempfile.TemporaryDirectory() as scratch:
        pair = {count: trainer(options, Path(scratch) / str(count), count) for count in (False, True)}
        batches = {count: iter(one.loader) for count, one in pair.items()}
        device = pair[True].device
        times: dict[bool, list[float]] = {False: [], True: []}
        for step in range(options.warmup + options.steps):
            for count in (False, True) if step % 2 else (True, False):  # neither is always the first
                one = pair[count]
                one.model.train()
                one.step += 1
                synchronize(device.type)
                start = time.perf_counter()
                one.train_step(batches[count])
                synchronize(device.type)
                if step >= options.warmup:
                    times[count].append(time.perf_counter() - start)

        counting = pair[True]
        reporter = counting.expert_usage
        assert reporter is not None
        reporter._drawing_seconds = float("inf")  # first without plots
        start = time.perf_counter()
        reporter.report(counting.step)
        report_seconds = time.perf_counter() - start
        start = time.perf_counter()
        draw(reporter.folder / "expert_usage.jsonl", reporter.folder)
        plot_seconds = time.perf_counter() - start
        freq = counting.config.metrics.expert_usage_freq
        peer = counting.config.model.peer
        layers = len(list(peer_layers(counting.model)))
        tokens = counting.config.training.local_batch_size * counting.config.training.seq_len
        places = (tokens, peer.num_heads, peer.num_experts_per_tok)
        # random experts: the hardest on the caches
        indices, gates = torch.randint(peer.num_experts, places, device=device), torch.rand(places, device=device)
        counts = torch.zeros(peer.num_heads, peer.num_experts, dtype=torch.int32, device=device)
        sums = torch.zeros(peer.num_heads, peer.num_experts, device=device)
        micro_batches = layers * counting.accumulation_steps
        one_call = median_ms(lambda _: count_experts(counts, sums, indices, gates), device.type, repeats=30)
        operator_ms = one_call * micro_batches

    medians = [statistics.median(times[count]) for count in (False, True)]
    quick = [statistics.quantiles(times[count], n=10)[0] for count in (False, True)]
    ratios = [with_it / without for without, with_it in zip(times[False], times[True])]  # neighbours in time
    low, middle, high = statistics.quantiles(ratios, n=4)
    off = quick[0]
    rows = [
        ["step without counting: median, tenth percentile", *(f"{1e3 * t:.1f} ms" for t in (medians[0], quick[0])), ""],
        [
            "step with counting",
            *(f"{1e3 * t:.1f} ms" for t in (medians[1], quick[1])),
            f"{_percent(medians[1] / medians[0])}, {_percent(quick[1] / quick[0])}",
        ],
        [
            "the same, neighbouring steps compared: median (quartiles)",
            "",
            "",
            f"{_percent(middle)} ({_percent(low)} to {_percent(high)})",
        ],
        [
            f"the counting operator alone, {layers} layers",
            f"{operator_ms:.2f} ms",
            "",
            f"{operator_ms / 10 / off:+.2f} %",
        ],
        [
            f"report, every {freq} steps",
            f"{1e3 * report_seconds:.1f} ms",
            "",
            f"{100 * report_seconds / freq / off:+.3f} %",
        ],
        ["plots, as often as 0.5 % of the time allows", f"{1e3 * plot_seconds:.0f} ms", "", "at most +0.5 %"],
    ]
    setting = (
        f"{options.config} {' '.join(options.job)}: {layers} PEER layers of {peer.num_experts:,} experts, {peer.num_heads} heads "
        f"x {peer.num_experts_per_tok} experts a token, {counting.config.training.global_batch_size} x "
        f"{counting.config.training.seq_len} tokens a step, compile {counting.config.compile.enable}; {options.steps} steps "
        f"each, in turns"
    )
    text = f"{setting}.\n\n{markdown_table(['', 'time', '', 'of a step'], rows)}"
    data = {"setting": setting, "seconds_without": times[False], "seconds_with": times[True]}
    name = f"expert-usage-{Path(options.config).stem}"
    write_results(name, device.type, text, data | {"report": report_seconds, "plots": plot_seconds}, options.output)
    print(text)


if __name__ == "__main__":
    main()
