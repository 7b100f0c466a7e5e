"""Sum up an ablation: results.csv and results.md, from the files in the runs' folders."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan_peer.ablation.plan import Plan, Run
from titan_peer.ablation.run import folder_of, status_of
from titan_peer.metrics.sinks import Record, complete_lines


@dataclass(frozen=True)
class Result:
    """What is known of one run."""

    run: Run
    state: str
    """done, failed or unfinished."""
    records: list[Record]
    error: str = ""
    beside: int = 0
    """The largest number of other runs on the same cores during the run."""

    @property
    def loss(self) -> float:
        """The loss by which runs are compared: the last validation loss or, without one, the mean training loss of the
        last tenth of the run."""
        if self.state != "done":
            return math.nan
        validation = [record["validation_loss"] for record in self.records if "validation_loss" in record]
        return validation[-1] if validation else self.training_loss

    @property
    def training_loss(self) -> float:
        losses = [record["loss"] for record in self.records if "loss" in record]
        return statistics.fmean(losses[-max(len(losses) // 10, 1) :]) if losses else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Median over the log lines; the first, which includes compilation, counts only if there is no other. nan
        without any."""
        speeds = [record["tokens_per_second"] for record in self.records if "tokens_per_second" in record]
        return statistics.median(speeds[1:] or speeds) if speeds else math.nan

    def last(self, key: str) -> Any:
        return next((record[key] for record in reversed(self.records) if key in record), "")


def collect(plan: Plan) -> list[Result]:
    results = []
    for run in plan.runs:
        status = status_of(run) or {"state": "unfinished"}
        records = complete_lines(folder_of(run) / "metrics.jsonl")
        results.append(Result(run, status["state"], records, status.get("error", ""), status.get("beside", 0)))
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

    @property
    def beside(self) -> int:
        return max(result.beside for result in self.results)

    def speed_text(self) -> str:
        """Tokens per second, mean over seeds; with a star if runs shared the cores."""
        speeds = [speed for result in self.results if not math.isnan(speed := result.tokens_per_second)]
        return f"{statistics.fmean(speeds):,.0f}{'*' * (self.beside > 0)}" if speeds else ""

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
    measured = ["validation_loss", "validation_bits_per_byte", "peak_memory_gib", "elapsed_seconds"]
    speeds = ["tokens_per_second", "other_runs_on_the_cores"]
    writer.writerow(["run", *axes, "seed", "state", *costs, "loss", "training_loss", *measured, *speeds, "error"])
    for result in results:
        run, cost = result.run, result.run.cost
        settings = [run.labels.get(axis, "base") for axis in axes]
        numbers = [getattr(cost, name) for name in costs]
        losses = ["" if math.isnan(x) else f"{x:.6f}" for x in (result.loss, result.training_loss)]
        found = [result.last(key) for key in measured]
        speed = result.tokens_per_second
        found += ["" if math.isnan(speed) else f"{speed:.1f}", result.beside]
        writer.writerow([run.name, *settings, run.seed, result.state, *numbers, *losses, *found, result.error])
    return out.getvalue()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "| --- " + "| ---: " * (len(header) - 1) + "|")
    return lines


def best_of(candidates: Sequence[tuple[str, PointResult]]) -> str:
    """The (label, design) with the lowest loss, and whether the difference could be chance."""
    (label, best), *others = sorted(candidates, key=lambda entry: entry[1].mean)
    text = f"**{label}**, loss {best.loss_text()}."
    if not others:
        return text
    next_label, following = others[0]
    gap = f"{following.mean - best.mean:.4f} lower than the next, {next_label}"
    if len(best.losses) == 1 or len(following.losses) == 1:
        return (
            f"{text} That is {gap}, from one seed, so it may be chance. Runs that differ only in their seed have "
            "different losses too; `--seeds 0 1 2` shows how different."
        )
    noise = max(best.deviation, following.deviation)
    if following.mean - best.mean <= noise:
        return f"{text} That is {gap}, which is no more than the standard deviation over seeds ({noise:.4f})."
    return f"{text} That is {gap}, more than the standard deviation over seeds ({noise:.4f})."


_EXPLANATION = """\
Loss: the last validation loss in nats per token; for a job without validation text, the mean training loss of the last
tenth of the run. ±: standard deviation over seeds. tokens/s: median over the log lines, mean over seeds.
"""


def results_markdown(plan: Plan, results: Sequence[Result], title: str) -> str:
    """The best design, a table for each axis, a table of all designs, and the failed runs."""
    points = {found.point: found for found in by_point(results)}
    done = [(found.point, found) for found in points.values() if found.losses]
    states = [result.state for result in results]
    lines = [f"# {title}", ""]
    lines.append(f"{len(results)} runs: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) + ".")
    if done:
        lines.append(f"Best: {best_of(done)}")
    lines.append("")
    if plan.notes:
        lines += ["Notes:", "", *(f"- {note}" for note in plan.notes), ""]
    header = ["design", "loss", "parameters", "active", "FLOPs per token", "tokens", "tokens/s"]

    def row(label: str, found: PointResult) -> list[str]:
        cost = found.results[0].run.cost
        numbers = [f"{n:,}" for n in (cost.total_parameters, cost.active_parameters, cost.flops_per_token, cost.tokens)]
        return [label, found.loss_text(), *numbers, found.speed_text()]

    for axis, labels in plan.axes.items():
        if not labels:
            continue
        shown = {label: f"{label} (base)" if point == "base" else label for label, point in labels.items()}
        rows = [row(shown[label], points[point]) for label, point in labels.items()]
        of_axis = [(label, points[point]) for label, point in labels.items() if points[point].losses]
        lines += [f"## {axis}", "", *_table(header, rows), ""]
        if of_axis:
            lines += [f"Best {axis}: {best_of(of_axis)}", ""]
    ranked = sorted(points.values(), key=lambda found: found.mean)
    lines += [
        "## All designs, lowest loss first",
        "",
        *_table(header, [row(found.point, found) for found in ranked]),
        "",
    ]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        lines += ["## Failed", "", *(f"- `{result.run.name}`: {result.error}" for result in failed), ""]
    lines.append(_EXPLANATION)
    most = max((found.beside for found in points.values()), default=0)
    if most:
        lines += [
            f"\\*: trained with up to {most} other runs on the same cores; such speeds cannot be compared.",
            "",
        ]
    return "\n".join(lines)
