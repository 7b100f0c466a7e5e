"""The plots of an ablation, and the report that they are part of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from titan_peer.ablation.axes import read_key
from titan_peer.ablation.plan import Plan, Run
from titan_peer.ablation.results import PointResult, Result, by_point, collect, results_csv, results_markdown
from titan_peer.ablation.run import write_whole


def write_report(plan: Plan, folder: Path, title: str) -> str:
    """Write results.csv, results.md and the plots from what the runs have written so far; returns the markdown."""
    results = collect(plan)
    markdown = results_markdown(plan, results, title)
    write_whole(folder / "results.csv", results_csv(plan, results))
    write_whole(folder / "results.md", markdown)
    draw(plan, results, folder)
    return markdown


def draw(plan: Plan, results: Sequence[Result], folder: Path) -> list[Path]:
    """loss_curves.png, loss_scaling.png and, for axes of numbers, sweeps.png; runs without a loss are left out. A
    design looks the same in all panels."""
    points = by_point(results)
    styles = design_styles([found.point for found in points])
    figures = {
        "loss_curves": loss_curves(panels(plan, points), styles),
        "loss_scaling": loss_scaling(points, styles),
    }
    if found := sweeps(plan, points):
        figures["sweeps"] = sweep_plot(found)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _smooth(values: Sequence[float], window: int) -> list[float]:
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


@dataclass(frozen=True)
class Style:
    """How a design is drawn in every panel of every plot."""

    colour: str
    marker: str
    line: str


def design_styles(points: Sequence[str]) -> dict[str, Style]:
    """A style for each design; different for up to 50 designs."""
    shapes = ("-", "--", "-.", ":", (0, (1, 3)))
    return {
        point: Style(f"C{i % 10}", "osD^v"[i // 10 % 5], shapes[i // 10 % 5])  # type: ignore[arg-type]
        for i, point in enumerate(points)
    }


Panel = list[tuple[str, PointResult]]


def panels(plan: Plan, results: Sequence[PointResult]) -> dict[str, Panel]:
    """What is drawn in one panel: the values of one axis, or all designs of a grid."""
    points = {found.point: found for found in results}
    axes = {axis: [(label, points[p]) for label, p in labels.items()] for axis, labels in plan.axes.items() if labels}
    return axes or {"all designs": list(points.items())}


def loss_curves(drawn: dict[str, Panel], styles: dict[str, Style]) -> Figure:
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(7 * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, entries) in zip(grid.flat, drawn.items()):
        for label, found in entries:
            shown = f"{label} (base)" if found.point == "base" else label
            for result in found.results:
                _curve(axes, result, styles[found.point], shown if result is found.results[0] else None)
        axes.set(xlabel="tokens", title=name)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(
                fontsize=8, ncols=1 + len(entries) // 10, title="line: training, marks: validation", title_fontsize=8
            )
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    return figure


def _curve(axes: Axes, result: Result, style: Style, label: str | None) -> None:
    per_step = result.run.cost.tokens / result.run.config.training.steps
    training = [(r["step"] * per_step, r["loss"]) for r in result.records if "loss" in r]
    validation = [(r["step"] * per_step, r["validation_loss"]) for r in result.records if "validation_loss" in r]
    if training:
        places, losses = zip(*training)
        smooth = _smooth(losses, max(len(losses) // 40, 1))
        axes.plot(places, smooth, color=style.colour, linestyle=style.line, linewidth=1.2, alpha=0.8, label=label)
    if validation:
        axes.plot(*zip(*validation), linestyle="", marker=style.marker, color=style.colour, markersize=4)


def loss_scaling(points: Sequence[PointResult], styles: dict[str, Style]) -> Figure:
    points = [found for found in points if found.losses]
    figure = Figure(figsize=(15, 5), layout="constrained")
    quantities: list[tuple[str, Callable[[Run], int]]] = [
        ("training FLOPs", lambda run: run.cost.flops),
        ("parameters", lambda run: run.cost.total_parameters),
        ("active parameters per token", lambda run: run.cost.active_parameters),
    ]
    for axes, (label, quantity) in zip(figure.subplots(1, 3, sharey=True), quantities):
        places = [quantity(found.results[0].run) for found in points]
        for found, place in zip(points, places):
            style = styles[found.point]
            shape = {"color": style.colour, "marker": style.marker}
            bar = [found.deviation] if len(found.losses) > 1 else None
            axes.errorbar([place], [found.mean], yerr=bar, capsize=4, label=found.point, linestyle="", **shape)
        axes.set_xlabel(label)
        if places and max(places) > 4 * min(places):
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.3, which="both")
    several = any(len(found.losses) > 1 for found in points)
    bars = "bars: standard deviation over seeds" if several else "one seed each, so no error bars"
    figure.axes[0].set_ylabel(f"loss (nats per token)\n{bars}")
    if points:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


Sweep = dict[str, list[tuple[float, PointResult]]]
"""One line per setting of the other axes: the values of an axis in increasing order, and what came out."""


def sweeps(plan: Plan, points: Sequence[PointResult]) -> dict[str, Sweep]:
    """The axes that have at least two numbers as values, such as learning rates.

    In a grid there is one line for each combination of the other axes' values. Otherwise there is one line, and the base
    job is on it with the value that it has.
    """
    found: dict[str, Sweep] = {}
    for axis, labels in plan.axes.items():
        lines: Sweep = {}
        for point in points:
            settings = point.results[0].run.labels
            others = ", ".join(f"{name} = {label}" for name, label in settings.items() if name != axis)
            of_axis = [label for label, name in labels.items() if name == point.point]
            label = settings.get(axis) if not labels else next(iter(of_axis), None)
            value = _number(_base_value(point, axis) if label == "unchanged" else label)
            if value is not None and point.losses:
                lines.setdefault(others if not labels else "", []).append((value, point))
        for line in lines.values():
            line.sort(key=lambda entry: entry[0])
        if any(len(line) > 1 for line in lines.values()):
            found[axis] = lines
    return found


def _base_value(point: PointResult, axis: str) -> str:
    try:
        return str(read_key(point.results[0].run.config, axis))
    except AttributeError:  # an axis with a name of its own
        return ""


def _number(label: str | None) -> float | None:
    try:
        return float(label or "")
    except ValueError:
        return None


def sweep_plot(found: dict[str, Sweep]) -> Figure:
    """Final loss against the value of each axis, a panel each."""
    figure = Figure(figsize=(6.5 * len(found), 4.5), layout="constrained")
    for axes, (axis, lines) in zip(figure.subplots(1, len(found), squeeze=False).flat, found.items()):
        for i, (others, line) in enumerate(lines.items()):
            places, results = [value for value, _ in line], [result for _, result in line]
            bars = [result.deviation for result in results] if any(len(r.losses) > 1 for r in results) else None
            losses = [result.mean for result in results]
            axes.errorbar(places, losses, yerr=bars, capsize=4, marker="o", color=f"C{i % 10}", label=others or None)
            best = min(range(len(losses)), key=losses.__getitem__)
            axes.annotate(
                f"{losses[best]:.3f}", (places[best], losses[best]), xytext=(0, -14), textcoords="offset points"
            )
        values = [value for line in lines.values() for value, _ in line]
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_xscale("log")
        axes.set(xlabel=axis, ylabel="loss (nats per token)")
        axes.grid(alpha=0.3, which="both")
        if any(lines):
            axes.legend(fontsize=8)
    return figure
