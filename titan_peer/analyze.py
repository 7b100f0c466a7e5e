"""`titan-peer analyze`: what a model consists of and what a token costs, without building it.

Parameters and FLOPs by layer and component, bytes of weights that decoding one token reads, the latent cache against other
kinds of attention, and the memory of a process for the configured parallelism: a table, JSON and a PNG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from titan_peer.config import JobConfig, load_config
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.errors import UserError
from titan_peer.estimate import MemoryEstimate, estimate_memory
from titan_peer.model import ModelArgs, Transformer
from titan_peer.model_size import COMPONENTS, ComponentSize, ModelSize, model_size
from titan_peer.resolve import resolve_vocabulary
from titan_peer.units import bytes_text, count_text

BYTES_A_NUMBER = 2
"""Of weights and caches in decoding: bfloat16."""


@dataclass(frozen=True)
class Analysis:
    """Everything the command shows."""

    job: str
    seq_len: int
    size: ModelSize
    kv_cache: dict[str, int]
    """Bytes a token, all layers, by kind of attention."""
    memory: MemoryEstimate

    @property
    def weight_bytes(self) -> int:
        """Weights that decoding one token alone reads, bytes."""
        return BYTES_A_NUMBER * self.size.active_parameters

    def by_component(self) -> dict[str, ComponentSize]:
        """Sums over the layers."""
        return _sums(self.size, lambda part: part.component, COMPONENTS)

    def by_layer(self) -> dict[str, ComponentSize]:
        """Sums over the components of a block."""
        layers = sorted({part.layer for part in self.size.components if part.layer is not None})
        names = ["outside of blocks", *(f"block {layer}" for layer in layers)]
        return _sums(self.size, lambda part: names[0] if part.layer is None else f"block {part.layer}", names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes and counts as whole numbers."""
        size = self.size
        return {
            "job": self.job,
            "seq_len": self.seq_len,
            "total_parameters": size.total_parameters,
            "active_parameters": size.active_parameters,
            "active_ratio": size.active_parameters / size.total_parameters,
            "forward_flops_per_token": size.forward_flops,
            "training_flops_per_token": size.training_flops,
            "weight_bytes_read_per_token": self.weight_bytes,
            "kv_cache_bytes_per_token": self.kv_cache,
            "memory_bytes_per_process": {
                **self.memory.by_kind,
                "process": self.memory.process_base,
                "total": self.memory.total,
            },
            "world_size": self.memory.world_size,
            "components": [asdict(part) for part in size.components],
        }


def _sums(size: ModelSize, key: Any, names: Sequence[str]) -> dict[str, ComponentSize]:
    groups: dict[str, list[ComponentSize]] = defaultdict(list)
    for part in size.components:
        groups[key(part)].append(part)
    return {
        name: ComponentSize(
            None,
            name,
            sum(part.total_parameters for part in groups[name]),
            sum(part.active_parameters for part in groups[name]),
            sum(part.forward_flops for part in groups[name]),
            sum(part.backward_flops for part in groups[name]),
        )
        for name in names
        if name in groups
    }


def kv_cache_bytes(args: ModelArgs) -> dict[str, int]:
    """Bytes a token that decoding keeps, all layers together (DeepSeek-V2, arXiv 2405.04434, table 1).

    The others are attentions with as many heads of the same dims: keys of qk_nope_head_dim + qk_rope_head_dim and values of
    v_head_dim for every head (MHA), for every fourth (GQA), for one (MQA).
    """
    mla = args.mla
    head = mla.qk_head_dim + mla.v_head_dim
    groups = -(-mla.n_heads // 4)
    numbers = {
        "MLA (latent and rotary key)": mla.kv_lora_rank + mla.qk_rope_head_dim,
        f"MHA ({mla.n_heads} heads)": mla.n_heads * head,
        f"GQA ({groups} groups)": groups * head,
        "MQA": head,
    }
    return {name: BYTES_A_NUMBER * args.n_layers * count for name, count in numbers.items()}


def analyze(config: JobConfig, world_size: int) -> Analysis:
    """Analyse a job on the meta device.

    Raises:
        UserError: the job cannot be, for this number of processes.
    """
    if config.model.vocab_size == 0:
        resolve_vocabulary(config.model, load_tokenizer(config.model.tokenizer_path).vocab_size)
    with torch.device("meta"):
        model = Transformer(config.model)
    size = model_size(model, config.training.seq_len)
    memory = estimate_memory(config, world_size)
    name = config.job.description or Path(config.job.config_file).stem or "default job"
    return Analysis(name, config.training.seq_len, size, kv_cache_bytes(config.model), memory)


# ---- showing it


def print_tables(analysis: Analysis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    size = analysis.size
    console.print(f"[bold]{analysis.job}[/bold]", highlight=False)
    for title, groups in (("component", analysis.by_component()), ("layer", analysis.by_layer())):
        table = Table(title=f"by {title}, a token of {analysis.seq_len:,}", title_justify="left")
        table.add_column(title)
        for column in ("parameters", "active a token", "FLOPs forward", "FLOPs training", "weights read"):
            table.add_column(column, justify="right")
        for name, part in groups.items():
            table.add_row(name, *_cells(part))
        total = ComponentSize(
            None,
            "",
            size.total_parameters,
            size.active_parameters,
            size.forward_flops,
            size.training_flops - size.forward_flops,
        )
        table.add_section()
        table.add_row("total", *_cells(total))
        console.print(table)
    share = size.active_parameters / size.total_parameters
    lines = [
        f"active / total parameters   {share:.4%}",
        "cache of a token in decoding, bfloat16",
        *(f"  {name:<28} {bytes_text(count):>10}" for name, count in analysis.kv_cache.items()),
        f"memory of a process ({analysis.memory.world_size} in the job)",
        *(f"  {kind:<28} {bytes_text(count):>10}" for kind, count in analysis.memory.by_kind.items() if count),
        f"  {'process (CPU run)':<28} {bytes_text(analysis.memory.process_base):>10}",
        f"  {'most at a time':<28} {bytes_text(analysis.memory.total):>10}",
    ]
    for line in lines:
        console.print(line, highlight=False)


def _cells(part: ComponentSize) -> list[str]:
    return [
        f"{part.total_parameters:,}",
        f"{part.active_parameters:,}",
        count_text(part.forward_flops),
        count_text(part.forward_flops + part.backward_flops),
        bytes_text(BYTES_A_NUMBER * part.active_parameters),
    ]


def plot(analysis: Analysis, output: Path) -> None:
    """The analysis as a PNG of four panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    components = analysis.by_component()
    names = list(components)
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    figure.suptitle(
        f"{analysis.job}\n{count_text(analysis.size.total_parameters)} parameters, "
        f"{count_text(analysis.size.active_parameters)} active a token"
    )
    colours = plt.get_cmap("tab10")

    places = range(len(names))
    total = [components[name].total_parameters for name in names]
    active = [components[name].active_parameters for name in names]
    panel = axes[0][0]
    panel.barh([p + 0.2 for p in places], total, 0.4, label="total", color=colours(0))
    panel.barh([p - 0.2 for p in places], active, 0.4, label="active a token", color=colours(1))
    panel.set(xscale="log", title="parameters", yticks=list(places), yticklabels=names, xlim=(1, 12 * max(total)))
    panel.invert_yaxis()
    for place, whole, part in zip(places, total, active):
        panel.text(max(whole, 1) * 1.15, place + 0.2, count_text(whole), va="center", fontsize=8)
        panel.text(max(part, 1) * 1.15, place - 0.2, count_text(part), va="center", fontsize=8)
    panel.legend()

    panel = axes[0][1]
    layers = sorted({part.layer for part in analysis.size.components if part.layer is not None})
    columns = [*layers, len(layers)]
    bottom = [0.0] * len(columns)
    for i, component in enumerate(COMPONENTS):
        heights = [
            sum(
                part.forward_flops + part.backward_flops
                for part in analysis.size.components
                if part.component == component
                and (part.layer == column or (part.layer is None and column == len(layers)))
            )
            for column in columns
        ]
        if any(heights):
            panel.bar(columns, heights, bottom=bottom, label=component, color=colours(i))
            bottom = [b + h for b, h in zip(bottom, heights)]
    step = max(1, len(layers) // 12)
    panel.set(
        title=f"training FLOPs a token at {analysis.seq_len:,} tokens", xlabel="block", ylim=(0, 1.35 * max(bottom))
    )
    panel.set_xticks([*layers[::step], len(layers)], [*map(str, layers[::step]), "head"])
    panel.legend(ncols=3, fontsize=8, loc="upper center")

    _bars(axes[1][0], analysis.kv_cache, "cache of a token in decoding, bfloat16", colours)
    memory = {kind: size for kind, size in analysis.memory.by_kind.items() if size}
    if analysis.memory.process_base:
        memory["process"] = analysis.memory.process_base
    title = f"memory of a process ({analysis.memory.world_size} in the job): {bytes_text(analysis.memory.total)}"
    _bars(axes[1][1], memory, title, colours)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _bars(panel: Any, sizes: dict[str, int], title: str, colours: Any) -> None:
    panel.barh(list(sizes), list(sizes.values()), color=[colours(i) for i in range(len(sizes))])
    panel.invert_yaxis()
    panel.set(title=title, xlim=(0, 1.25 * max(sizes.values())), xticks=[])
    for i, size in enumerate(sizes.values()):
        panel.text(size, i, "  " + bytes_text(size), va="center", fontsize=9)


def main(args: Sequence[str] | None = None) -> int:
    """Analyse a job; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="titan-peer analyze",
        description="Parameters, FLOPs, cache and memory of a job's model, which is never built.",
        epilog="Any key of a job may follow, as for run_train.sh.\n\nExamples:\n"
        "  titan-peer analyze --job.config_file train_configs/peer_1m.toml --output model_analysis.png\n"
        "  titan-peer analyze --job.config_file train_configs/peer_1m_multinode.toml --world-size 16 --json analysis.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="write a plot")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all numbers")
    parser.add_argument("--world-size", type=int, default=1, help="processes of the job, all machines together")
    options, job_arguments = parser.parse_known_args(args)
    if options.world_size < 1:
        parser.error(f"--world-size = {options.world_size}: must be at least 1")
    analysis = analyze(load_config(job_arguments), options.world_size)
    print_tables(analysis)
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(analysis.as_dict(), indent=1) + "\n")
            print(f"numbers: {options.json}")
        if options.output is not None:
            plot(analysis, options.output)
            print(f"plot: {options.output}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
