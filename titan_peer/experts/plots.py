"""Plots of expert usage, from the records of an expert_usage.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from titan_peer.experts.usage import PERCENTILES
from titan_peer.metrics.sinks import Record, complete_lines


def draw(records_file: Path, folder: Path) -> dict[str, Path]:
    """Draw the plots of an expert_usage.jsonl into `folder`; returns their paths by name.

    rank_frequency: load against rank on logarithmic axes, one line per layer; load_percentiles: layers x percentiles of
    load; over_time (from the second report on): share used, unevenness, Gini coefficient and dead experts against
    steps.
    """
    records = complete_lines(records_file)
    last_step = records[-1]["step"]
    latest = [record for record in records if record["step"] == last_step]
    figures = {"rank_frequency": _rank_frequency(latest), "load_percentiles": _load_percentiles(latest)}
    if records[0]["step"] != last_step:
        figures["over_time"] = _over_time(records)
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(paths[name], dpi=120)
    return paths


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(number - 1, 1)) for i in range(number)]


def load_text(load: float) -> str:
    """A load with two digits or as a whole number, never as a power of ten: 970, 1.8, 0.022, <0.001."""
    if load >= 10:
        return f"{load:,.0f}"
    if 0 < load < 0.001:
        return "<0.001"
    return f"{load:.2g}"


def _rank_frequency(latest: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for record, colour in zip(latest, _colours(len(latest))):
        points = [(rank, load) for rank, load in zip(record["ranks"], record["loads_at_ranks"]) if load > 0]
        axes.loglog(*zip(*points), color=colour, label=f"layer {record['layer']}", linewidth=1.5)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1, label="uniform usage")
    axes.set(xlabel="rank of the expert (1: the most loaded)", ylabel="load (multiples of the uniform share of gates)")
    axes.set_title(f"Load of experts by rank, step {latest[0]['step']} (unused experts are not drawn)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=1 + len(latest) // 12)
    return figure


def _load_percentiles(latest: Sequence[Record]) -> Figure:
    from matplotlib.colors import LogNorm

    figure = Figure(figsize=(9, 1.8 + 0.4 * len(latest)), layout="constrained")
    axes = figure.subplots()
    # all loads below a thousandth of the uniform share have the same colour
    values = [[max(load, 1e-3) for load in record["percentiles"]] for record in latest]
    picture = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=LogNorm(1e-3, 1e3))
    for i, record in enumerate(latest):
        for j, load in enumerate(record["percentiles"]):
            dark = load > 30 or load < 0.03
            axes.text(j, i, load_text(load), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(PERCENTILES)), [f"{p:g}" for p in PERCENTILES])
    axes.set_yticks(range(len(latest)), [str(record["layer"]) for record in latest])
    axes.set(xlabel="percentile of experts", ylabel="layer")
    axes.set_title(f"Load at percentiles, multiples of the uniform share, step {latest[0]['step']}", fontsize=10)
    figure.colorbar(picture, label="load")
    return figure


def _over_time(records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    layers = sorted({record["layer"] for record in records})
    panels = (
        ("share_used", "experts used, share of all"),
        ("unevenness", "unevenness (nats)"),
        ("gini", "Gini coefficient"),
        ("dead", "dead experts, share of all"),
    )
    for axes, (key, label) in zip(grid.flat, panels):
        for layer, colour in zip(layers, _colours(len(layers))):
            of_layer = [record for record in records if record["layer"] == layer]
            values = [r["dead"] / r["num_experts"] if key == "dead" else r["whole"][key] for r in of_layer]
            steps = [record["step"] for record in of_layer]
            axes.plot(steps, values, color=colour, marker=".", linewidth=1.2, label=f"layer {layer}")
        axes.set(ylabel=label, ylim=(0, 1.05 * axes.get_ylim()[1]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("step")
    grid[0][0].legend(fontsize=8, ncols=1 + len(layers) // 12)
    figure.suptitle("Expert usage over time")
    return figure
