"""Summing up an ablation: results.csv, results.md and two plots, from what is in the runs' folders."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from titan_peer.ablation.plan import Plan, Run
from titan_peer.ablation.run import folder_of, status_of
from titan_peer.sinks import Record, complete_lines


@dataclass(frozen=True)
class Result:
    """What is known of one run."""

    run: Run
    state: str
    """done, failed or unfinished."""
    records: list[Record]
    error: str = ""

    @property
    def loss(self) -> float:
        """What runs are compared by: the last validation loss; the mean training loss of the last tenth without one."""
        if self.state != "done":
            return math.nan
        validation = [record["validation_loss"] for record in self.records if "validation_loss" in record]
        return validation[-1] if validation else self.training_loss

    @property
    def training_loss(self) -> float:
        losses = [record["loss"] for record in self.records if "loss" in record]
        return statistics.fmean(losses[-max(len(losses) // 10, 1) :]) if losses else math.nan

    def last(self, key: str) -> Any:
        return next((record[key] for record in reversed(self.records) if key in record), "")


def collect(plan: Plan) -> list[Result]:
    results = []
    for run in plan.runs:
        status = status_of(run) or {"state": "unfinished"}
        records = complete_lines(folder_of(run) / "metrics.jsonl")
        results.append(Result(run, status["state"], records, status.get("error", "")))
    return results


@dataclass(frozen=True)
class PointResult:
    """The runs of one design, over seeds."""

    point: str
    results: list[Result]

    @property
    def losses(self) -> list[float]:
        return [result.loss for result in self.results if result.state == "done"]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses) if self.losses else math.inf

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0

    def loss_text(self) -> str:
        if not self.losses:
            return "failed" if any(result.state == "failed" for result in self.results) else "unfinished"
        spread = f" ± {self.deviation:.4f}" if len(self.losses) > 1 else ""
        missing = len(self.results) - len(self.losses)
        return f"{self.mean:.4f}{spread}" + (f" ({missing} of {len(self.results)} runs missing)" if missing else "")


def by_point(results: Sequence[Result]) -> list[PointResult]:
    grouped: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        grouped[result.run.point].append(result)
    return [PointResult(point, found) for point, found in grouped.items()]


def results_csv(plan: Plan, results: Sequence[Result]) -> str:
    axes = list(plan.axes)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    costs = ["total_parameters", "active_parameters", "flops_per_token", "tokens", "flops"]
    measured = [
        "validation_loss",
        "validation_bits_per_byte",
        "tokens_per_second",
        "peak_memory_gib",
        "elapsed_seconds",
    ]
    writer.writerow(["run", *axes, "seed", "state", *costs, "loss", "training_loss", *measured, "error"])
    for result in results:
        run, cost = result.run, result.run.cost
        settings = [run.labels.get(axis, "base") for axis in axes]
        numbers = [getattr(cost, name) for name in costs]
        losses = ["" if math.isnan(x) else f"{x:.6f}" for x in (result.loss, result.training_loss)]
        found = [result.last(key) for key in measured]
        writer.writerow([run.name, *settings, run.seed, result.state, *numbers, *losses, *found, result.error])
    return out.getvalue()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "| --- " + "| ---: " * (len(header) - 1) + "|")
    return lines


def results_markdown(plan: Plan, results: Sequence[Result], title: str) -> str:
    """Best design, a table an axis (or of all combinations), what failed."""
    points = {found.point: found for found in by_point(results)}
    done = [found for found in points.values() if found.losses]
    states = [result.state for result in results]
    lines = [f"# {title}", ""]
    lines.append(f"{len(results)} runs: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) + ".")
    if done:
        best, *others = sorted(done, key=lambda found: found.mean)
        lines.append(f"Best: **{best.point}**, loss {best.loss_text()}.")
        if others and others[0].mean - best.mean <= max(best.deviation, others[0].deviation):
            lines.append(f"The next, {others[0].point}, is within one standard deviation over seeds of it.")
    lines.append("")
    header = ["design", "loss", "parameters", "active", "FLOPs a token", "tokens", "tokens/s"]

    def row(label: str, found: PointResult) -> list[str]:
        first = found.results[0]
        cost, speed = first.run.cost, first.last("tokens_per_second")
        numbers = [f"{n:,}" for n in (cost.total_parameters, cost.active_parameters, cost.flops_per_token, cost.tokens)]
        return [label, found.loss_text(), *numbers, f"{speed:,.0f}" if speed else ""]

    for axis, labels in plan.axes.items():
        if not labels:
            continue
        shown = {label: f"{label} (base)" if point == "base" else label for label, point in labels.items()}
        rows = [row(shown[label], points[point]) for label, point in labels.items()]
        of_axis = [(points[point], label) for label, point in labels.items() if points[point].losses]
        lines += [f"## {axis}", "", *_table(header, rows), ""]
        if of_axis:
            best_label = min(of_axis, key=lambda entry: entry[0].mean)[1]
            lines += [f"Best {axis}: **{best_label}**.", ""]
    ranked = sorted(points.values(), key=lambda found: found.mean)
    lines += ["## All designs, best first", "", *_table(header, [row(found.point, found) for found in ranked]), ""]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        lines += ["## Failed", "", *(f"- `{result.run.name}`: {result.error}" for result in failed), ""]
    lines += [
        "Loss: the last validation loss, nats a token; where a job has no validation text, the mean training loss of"
    ]
    lines += ["the last tenth of the run. ±: standard deviation over seeds.", ""]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Plots


def draw(plan: Plan, results: Sequence[Result], folder: Path) -> list[Path]:
    """loss_curves.png and loss_scaling.png; runs without a loss are left out."""
    figures = {"loss_curves": _loss_curves(plan, results), "loss_scaling": _loss_scaling(results)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _smooth(values: Sequence[float], window: int) -> list[float]:
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def _panels(plan: Plan, points: dict[str, PointResult]) -> dict[str, list[tuple[str, PointResult]]]:
    """What is drawn together: the values of an axis; all designs of a grid."""
    axes = {axis: [(label, points[p]) for label, p in labels.items()] for axis, labels in plan.axes.items() if labels}
    return axes or {"all designs": list(points.items())}


def _loss_curves(plan: Plan, results: Sequence[Result]) -> Figure:
    panels = _panels(plan, {found.point: found for found in by_point(results)})
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, entries) in zip(grid.flat, panels.items()):
        for i, (label, found) in enumerate(entries):
            for result in found.results:
                _curve(axes, result, f"C{i % 10}", label if result is found.results[0] else None)
        axes.set(xlabel="tokens", title=name)
        axes.set_ylabel("loss (nats a token); o: validation")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8, ncols=1 + len(entries) // 10)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    return figure


def _curve(axes: Axes, result: Result, colour: str, label: str | None) -> None:
    per_step = result.run.cost.tokens / result.run.config.training.steps
    training = [(r["step"] * per_step, r["loss"]) for r in result.records if "loss" in r]
    validation = [(r["step"] * per_step, r["validation_loss"]) for r in result.records if "validation_loss" in r]
    if training:
        places, losses = zip(*training)
        smooth = _smooth(losses, max(len(losses) // 40, 1))
        axes.plot(places, smooth, color=colour, linewidth=1.2, alpha=0.8, label=label)
    if validation:
        axes.plot(*zip(*validation), "o", color=colour, markersize=4)


def _loss_scaling(results: Sequence[Result]) -> Figure:
    points = [found for found in by_point(results) if found.losses]
    figure = Figure(figsize=(15, 5), layout="constrained")
    quantities: list[tuple[str, Callable[[Run], int]]] = [
        ("training FLOPs", lambda run: run.cost.flops),
        ("parameters", lambda run: run.cost.total_parameters),
        ("active parameters a token", lambda run: run.cost.active_parameters),
    ]
    for axes, (label, quantity) in zip(figure.subplots(1, 3, sharey=True), quantities):
        places = [quantity(found.results[0].run) for found in points]
        for i, (found, place) in enumerate(zip(points, places)):
            style = {"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5]}
            axes.errorbar([place], [found.mean], yerr=[found.deviation], capsize=4, label=found.point, **style)
        axes.set_xlabel(label)
        if places and max(places) > 4 * min(places):
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("loss (nats a token); bars: standard deviation over seeds")
    if points:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
