"""An analysis as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from titan_peer.analysis.analyze import Analysis
from titan_peer.analysis.model_size import COMPONENTS
from titan_peer.common.units import bytes_text, count_text
from titan_peer.experts.usage import LayerUsage


def draw(analysis: Analysis) -> Figure:
    """The analysis in four panels, and two more where experts were counted."""
    rows = 3 if analysis.usage else 2
    figure = Figure(figsize=(13, 4.25 * rows), layout="constrained")
    axes = figure.subplots(rows, 2)
    figure.suptitle(
        f"{analysis.job}\n{count_text(analysis.size.total_parameters)} parameters, "
        f"{count_text(analysis.size.active_parameters)} active per token"
    )
    colours = colormaps["tab10"]
    _plot_parameters(axes[0][0], analysis, colours)
    _plot_flops(axes[0][1], analysis, colours)
    _bars(axes[1][0], analysis.kv_cache, "cache per token in decoding, bfloat16", colours)
    title = f"memory per process ({analysis.memory.world_size} in the job): {bytes_text(analysis.memory.total)}"
    _bars(axes[1][1], analysis.memory.rows(), title, colours)
    if analysis.usage:
        _plot_usage(axes[2], analysis.usage, colours)
    return figure


def _plot_parameters(panel: Axes, analysis: Analysis, colours: Any) -> None:
    """Total and active parameters of each component."""
    components = analysis.by_component()
    names = list(components)
    places = range(len(names))
    total = [components[name].total_parameters for name in names]
    active = [components[name].active_parameters for name in names]
    panel.barh([p - 0.2 for p in places], total, 0.4, label="total", color=colours(0))
    panel.barh([p + 0.2 for p in places], active, 0.4, label="active per token", color=colours(1))
    panel.set(xscale="log", title="parameters, all layers", yticks=list(places), yticklabels=names)
    panel.set(xlim=(1, 12 * max(total)), xlabel="parameters (logarithmic)")
    panel.set_ylim(len(names) - 0.4, -1.4)  # downwards, with room for the legend
    for place, whole, part in zip(places, total, active):
        panel.text(max(whole, 1) * 1.15, place - 0.2, count_text(whole), va="center", fontsize=8)
        panel.text(max(part, 1) * 1.15, place + 0.2, count_text(part), va="center", fontsize=8)
    panel.legend(loc="upper right", ncols=2)


def _plot_flops(panel: Axes, analysis: Analysis, colours: Any) -> None:
    """Training FLOPs of each block and of the head, stacked by component."""
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


def _bars(panel: Axes, sizes: dict[str, int], title: str, colours: Any) -> None:
    panel.barh(list(sizes), list(sizes.values()), color=[colours(i) for i in range(len(sizes))])
    panel.invert_yaxis()
    panel.set(title=title, xlim=(0, 1.25 * max(sizes.values())), xticks=[])
    for i, size in enumerate(sizes.values()):
        panel.text(size, i, "  " + bytes_text(size), va="center", fontsize=9)
