"""`titan-peer analyze`: what a model consists of and what a token costs, without building it.

Parameters and FLOPs by layer and component, bytes of weights that decoding one token reads, the latent cache against other
kinds of attention, and the memory of a process for the configured parallelism: a table, JSON and a PNG.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titan_peer.analysis.estimate import MemoryEstimate, estimate_memory
from titan_peer.analysis.model_size import COMPONENTS, ComponentSize, ModelSize, model_size
from titan_peer.checkpoint.choice import WHAT_TO_GIVE, find_checkpoint
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.commands.experts import batches, measure, read_documents, say_if_short, usage_table
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import UserError
from titan_peer.common.units import bytes_text, count_text
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config
from titan_peer.config.resolve import resolve_vocabulary
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.experts.usage import LayerUsage
from titan_peer.inference.latent_cache import cache_bytes_per_token
from titan_peer.model import ModelArgs, Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BYTES_PER_NUMBER = 2
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
    usage: list[LayerUsage]
    """Of a checkpoint's PEER layers, on text; empty when none is given."""

    @property
    def weight_bytes(self) -> int:
        """Weights that decoding one token alone reads, bytes."""
        return BYTES_PER_NUMBER * self.size.active_parameters

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
            "memory_bytes_per_process": {**self.memory.rows(), "total": self.memory.total},
            "world_size": self.memory.world_size,
            "expert_usage": [usage.scalars() for usage in self.usage],
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
    latent = cache_bytes_per_token(args, torch.bfloat16)
    numbers = {
        f"MHA ({mla.n_heads} heads)": mla.n_heads * head,
        f"GQA ({groups} group{'s' * (groups > 1)})": groups * head,
        "MQA": head,
    }
    others = {name: BYTES_PER_NUMBER * args.n_layers * count for name, count in numbers.items()}
    return {"MLA (latent and rotary key)": latent, **others}


def checkpoint_usage(config: JobConfig, checkpoint: str, num_tokens: int) -> list[LayerUsage]:
    """Which experts a checkpoint of the job uses, on the first `num_tokens` tokens of the job's held-out text (of its
    training text if it has none).

    Raises:
        UserError: the checkpoint cannot be read, or is not of this job's model.
    """
    model, job, tokenizer = load_model_for_inference(find_checkpoint(checkpoint, "--checkpoint"))
    ours, theirs = asdict(config.model), asdict(job.model)
    for key in ours:
        if key not in ("vocab_size", "tokenizer_path") and ours[key] != theirs[key]:
            raise UserError(f"--checkpoint {checkpoint}: its model.{key} = {theirs[key]}, but the job's is {ours[key]}")
    paths = [source.path for source in config.validation.sources or config.data.sources]
    work = batches(read_documents(paths, tokenizer), config.training.seq_len, 8, num_tokens)
    say_if_short(work, num_tokens)
    return measure(model, work)


def analyze(config: JobConfig, world_size: int, usage: Sequence[LayerUsage] = ()) -> Analysis:
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
    return Analysis(name, config.training.seq_len, size, kv_cache_bytes(config.model), memory, list(usage))


# ---- showing it


def print_tables(analysis: Analysis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    size = analysis.size
    console.print(f"[bold]{analysis.job}[/bold]", highlight=False)
    for title, groups in (("component", analysis.by_component()), ("layer", analysis.by_layer())):
        table = Table(title=f"by {title}, per token of a sequence of {analysis.seq_len:,}", title_justify="left")
        table.add_column(title)
        for column in ("parameters", "active per token", "FLOPs forward", "FLOPs training", "weights read"):
            table.add_column(column, justify="right")
        for name, part in _runs(groups):
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
        "cache per token in decoding, bfloat16",
        *(f"  {name:<28} {bytes_text(count):>10}" for name, count in analysis.kv_cache.items()),
        f"memory per process ({analysis.memory.world_size} in the job)",
        *(f"  {kind:<28} {bytes_text(count):>10}" for kind, count in analysis.memory.rows().items()),
        f"  {'most at a time':<28} {bytes_text(analysis.memory.total):>10}",
    ]
    for line in lines:
        console.print(line, highlight=False)
    if analysis.usage:
        console.print(f"\nexperts used, {analysis.usage[0].expected:.1f} uses of an expert if all were used alike")
        console.print(usage_table(analysis.usage), highlight=False)


def _runs(groups: dict[str, ComponentSize]) -> Iterator[tuple[str, ComponentSize]]:
    """Blocks in a row that are equal become one row, "block 0 to 4", with the numbers of each."""
    items = list(groups.items())
    for _, equal in itertools.groupby(items, key=lambda item: dataclasses.replace(item[1], component="")):
        names = [name for name, _ in equal]
        label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].split()[-1]}, each"
        yield label, groups[names[0]]


def _cells(part: ComponentSize) -> list[str]:
    return [
        f"{part.total_parameters:,}",
        f"{part.active_parameters:,}",
        count_text(part.forward_flops),
        count_text(part.forward_flops + part.backward_flops),
        bytes_text(BYTES_PER_NUMBER * part.active_parameters),
    ]


def draw(analysis: Analysis) -> Figure:
    """The analysis in four panels, and two more where experts were counted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    components = analysis.by_component()
    names = list(components)
    rows = 3 if analysis.usage else 2
    figure = Figure(figsize=(13, 4.25 * rows), layout="constrained")
    axes = figure.subplots(rows, 2)
    figure.suptitle(
        f"{analysis.job}\n{count_text(analysis.size.total_parameters)} parameters, "
        f"{count_text(analysis.size.active_parameters)} active per token"
    )
    colours = colormaps["tab10"]

    places = range(len(names))
    total = [components[name].total_parameters for name in names]
    active = [components[name].active_parameters for name in names]
    panel = axes[0][0]
    panel.barh([p - 0.2 for p in places], total, 0.4, label="total", color=colours(0))
    panel.barh([p + 0.2 for p in places], active, 0.4, label="active per token", color=colours(1))
    panel.set(xscale="log", title="parameters, all layers", yticks=list(places), yticklabels=names)
    panel.set(xlim=(1, 12 * max(total)), xlabel="parameters (logarithmic)")
    panel.set_ylim(len(names) - 0.4, -1.4)  # downwards, with room for the legend
    for place, whole, part in zip(places, total, active):
        panel.text(max(whole, 1) * 1.15, place - 0.2, count_text(whole), va="center", fontsize=8)
        panel.text(max(part, 1) * 1.15, place + 0.2, count_text(part), va="center", fontsize=8)
    panel.legend(loc="upper right", ncols=2)

    panel = axes[0][1]
    layers = sorted({part.layer for part in analysis.size.components if part.layer is not None})
    columns = [*layers, len(layers)]
    bottom = [0.0] * len(columns)
    for i, component in enumerate(COMPONENTS):
        heights = [
            sum(
                (part.forward_flops + part.backward_flops) / 1e6
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
        title=f"training FLOPs per token, sequences of {analysis.seq_len:,}",
        xlabel="block",
        ylabel="MFLOPs",
        ylim=(0, 1.35 * max(bottom)),
    )
    panel.set_xticks([*layers[::step], len(layers)], [*map(str, layers[::step]), "head"])
    panel.legend(ncols=3, fontsize=8, loc="upper center")

    _bars(axes[1][0], analysis.kv_cache, "cache per token in decoding, bfloat16", colours)
    title = f"memory per process ({analysis.memory.world_size} in the job): {bytes_text(analysis.memory.total)}"
    _bars(axes[1][1], analysis.memory.rows(), title, colours)
    if analysis.usage:
        _plot_usage(axes[2], analysis.usage, colours)
    return figure


def _plot_usage(panels: Any, usage: Sequence[LayerUsage], colours: Any) -> None:
    names = [f"block {layer.layer}" for layer in usage]
    shares = [100 * layer.whole.share_used for layer in usage]
    panels[0].barh(names, shares, color=colours(0))
    panels[0].invert_yaxis()
    panels[0].set(title="experts used", xlabel="per cent of the experts", xlim=(0, 115))
    for i, share in enumerate(shares):
        panels[0].text(share, i, f"  {share:.1f}", va="center", fontsize=9)
    for i, layer in enumerate(usage):
        ranks = [(rank, load) for rank, load in zip(layer.ranks, layer.loads_at_ranks) if load > 0]
        panels[1].plot(*zip(*ranks), label=names[i], color=colours(i))
    panels[1].axhline(1, color="grey", linewidth=0.8, linestyle="--")
    panels[1].set(
        xscale="log",
        yscale="log",
        title="load of experts by rank",
        xlabel="rank of the expert (1: the most loaded)",
        ylabel="multiples of the uniform share of gates",
    )
    panels[1].legend(fontsize=8)


def _bars(panel: Any, sizes: dict[str, int], title: str, colours: Any) -> None:
    panel.barh(list(sizes), list(sizes.values()), color=[colours(i) for i in range(len(sizes))])
    panel.invert_yaxis()
    panel.set(title=title, xlim=(0, 1.25 * max(sizes.values())), xticks=[])
    for i, size in enumerate(sizes.values()):
        panel.text(size, i, "  " + bytes_text(size), va="center", fontsize=9)


def main(args: Sequence[str] | None = None) -> int:
    """Analyse a job; returns the exit status."""
    parser = CommandParser(
        "analyze",
        "Parameters, FLOPs, cache and memory of a job's model, which is never built.",
        "Any key of the job may be given besides, as for run_train.sh.\n\nexamples:\n"
        "  titan-peer analyze --job.config_file train_configs/peer_1m.toml --output model_analysis.png\n"
        "  titan-peer analyze --job.config_file train_configs/peer_1m_multinode.toml --world_size 16 --json analysis.json\n"
        "  titan-peer analyze --job.config_file train_configs/debug_model.toml --checkpoint outputs/debug_model "
        "--output model_analysis.png",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="write a plot")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all numbers")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help=f"also run a checkpoint of the job and count its experts: {WHAT_TO_GIVE}"
    )
    parser.add_argument(
        "--tokens", type=int, default=20_000, metavar="N", help="of held-out text for that (default: %(default)s)"
    )
    parser.add_argument(
        "--world_size",
        type=int,
        default=1,
        metavar="N",
        help="processes of the job, all machines together (default: 1)",
    )
    options, job_arguments = parser.parse_known_args(args)
    if options.world_size < 1:
        raise UserError(f"--world_size {options.world_size}: must be at least 1")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: must be at least 1")
    config = load_config(job_arguments)
    usage = checkpoint_usage(config, options.checkpoint, options.tokens) if options.checkpoint else []
    analysis = analyze(config, options.world_size, usage)
    print_tables(analysis)
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(analysis.as_dict(), indent=1) + "\n", encoding="utf-8")
            print(f"numbers: {options.json}")
        if options.output is not None:
            draw(analysis).savefig(options.output, dpi=120)
            print(f"plot: {options.output}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
