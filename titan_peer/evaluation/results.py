"""Results of evaluations: metrics records, tables for people, and a plot over the steps of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX = "evaluation/"
FAILED = "failed"
_SHARES = ("acc", "exact_match", "f1")  # beginnings of metrics that lie between 0 and 1
_SAMPLES = "samples"
# the evals package's standard error of an accuracy, by bootstrapping over its samples
BOOTSTRAP_OF = {"accuracy": "bootstrap_std", "accuracy_by_log_likelihood": "bootstrap_std_by_log_likelihood"}


@dataclass(frozen=True)
class Result:
    """One evaluation's numbers, or why there are none."""

    kind: str
    """perplexity, evals or tasks."""
    name: str
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    """Samples (evals, tasks) or predicted tokens (perplexity)."""
    seconds: float = 0.0
    error: str = ""
    """Why there are no numbers."""
    stopped: bool = False
    """Broken off because the job was told to stop, which is neither a success nor a failure."""

    def record(self) -> dict[str, float]:
        """`evaluation/<kind>/<name>/<metric>`: value, and the number of samples as a metric; a failed evaluation has
        the metric `failed` = 1 only."""
        if self.stopped:
            return {}
        stem = f"{PREFIX}{self.kind}/{self.name}/"
        if self.error:
            return {f"{stem}{FAILED}": 1.0}
        found = {f"{stem}{metric}": value for metric, value in self.metrics.items() if math.isfinite(value)}
        return found | ({f"{stem}{_SAMPLES}": float(self.samples)} if found else {})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A Markdown table with aligned columns; from column `numbers_from` on they are right-aligned."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * w if i < numbers_from else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [c.ljust(w) if i < numbers_from else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def _spread_of(metric: str) -> str:
    """The name of the metric that holds a metric's standard error."""
    name, filtered, filter_name = metric.partition(" (")  # lm_eval's filters
    return BOOTSTRAP_OF.get(name) or f"{name}_stderr{filtered}{filter_name}"


def _is_spread(metric: str) -> bool:
    """Whether the metric is the standard error of another metric."""
    return metric in BOOTSTRAP_OF.values() or metric.partition(" (")[0].endswith("_stderr")


def _with_spread(value: float, spread: float | None) -> str:
    return _number(value) + ("" if spread is None or not math.isfinite(spread) else f" ± {_number(spread)}")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def result_table(results: Sequence[Result]) -> str:
    """One row per metric, for one checkpoint."""
    rows = []
    for result in results:
        if result.error:
            rows.append([result.kind, result.name, FAILED, result.error.splitlines()[0][:80], "", ""])
            continue
        effort = [f"{result.samples:,}", f"{result.seconds:.1f}"]
        for metric, value in result.metrics.items():
            if _is_spread(metric):
                continue
            shown = _with_spread(value, result.metrics.get(_spread_of(metric)))
            rows.append([result.kind, result.name, metric, shown, *effort])
            effort = ["", ""]
    return _table(["kind", "evaluation", "metric", "value", "samples", "seconds"], rows, numbers_from=3)


def write_results(folder: Path, checkpoint: Path, results: Sequence[Result]) -> None:
    """Write results.json and results.md, for one checkpoint."""
    keys = ("kind", "name", "metrics", "samples", "seconds", "error")
    document = {
        "checkpoint": str(checkpoint),
        "results": [{key: getattr(result, key) for key in keys} for result in results],
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    page = f"# Evaluation of {checkpoint}\n\n{result_table(results)}\n"
    (folder / "results.md").write_text(page, encoding="utf-8", errors="backslashreplace")


@dataclass
class _Series:
    """A metric over a run."""

    kind: str
    name: str
    metric: str
    values: dict[int, float] = field(default_factory=dict)
    """step: value"""
    spreads: dict[int, float] = field(default_factory=dict)
    """step: standard error, if measured"""
    samples: int = 0
    """Number of samples at the newest step."""

    @property
    def unit(self) -> str:
        return "tokens" if self.kind == "perplexity" else "samples"


def _series(records: Sequence[dict[str, float]]) -> list[_Series]:
    """Every metric, in order of first appearance, with its standard errors and number of samples."""
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(PREFIX):
                columns.setdefault(key.removeprefix(PREFIX), {})[int(record["step"])] = value
    series = []
    for key, values in columns.items():
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if metric == _SAMPLES or _is_spread(metric):
            continue
        samples = columns.get(f"{kind}/{name}/{_SAMPLES}", {0: 0})
        spreads = columns.get(f"{kind}/{name}/{_spread_of(metric)}", {})
        series.append(_Series(kind, name, metric, values, spreads, int(samples[max(samples)])))
    return series


def history_table(records: Sequence[dict[str, float]], max_steps: int = 8) -> str:
    """A run's evaluations: one row per metric, one column per step (the newest `max_steps`), values with standard
    errors.

    Args:
        records: those of metrics.jsonl; records without evaluations are ignored.
    """
    series = _series(records)
    steps = sorted({step for one in series for step in one.values})[-max_steps:]
    rows = []
    for one in series:
        if any(step in one.values for step in steps):
            shown = [_with_spread(one.values[s], one.spreads.get(s)) if s in one.values else "" for s in steps]
            samples = f"{one.samples:,} {one.unit}" if one.samples else ""
            rows.append([one.kind, one.name, one.metric, samples, *shown])
    header = ["kind", "evaluation", "metric", "samples", *(f"step {s}" for s in steps)]
    return _table(header, rows, numbers_from=3)


def plot_history(records: Sequence[dict[str, float]], output: Path) -> None:
    """Every metric against the step, one small panel each, with standard errors, as a PNG; without records nothing is
    written."""
    series = [one for one in _series(records) if one.metric != FAILED]
    if not series:
        return
    figure = _figure(series)
    figure.savefig(output, dpi=110)
    import matplotlib.pyplot as plt

    plt.close(figure)


def _figure(series: Sequence[_Series]) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(series))
    num_rows = -(-len(series) // columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(4 * columns, 2.6 * num_rows), layout="constrained", squeeze=False
    )
    steps = sorted({step for one in series for step in one.values})
    for panel, one in zip(axes.flat, series):
        spreads = [one.spreads.get(step, math.nan) for step in one.values]
        bars = None if all(map(math.isnan, spreads)) else spreads
        panel.errorbar(
            list(one.values), list(one.values.values()), bars, fmt="o-", linewidth=1.2, markersize=3, capsize=2
        )
        panel.set_title(
            f"{one.name}\n{one.metric}" + (f", {one.samples:,} {one.unit}" if one.samples else ""), fontsize=8
        )
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        margin = 0.05 * (steps[-1] - steps[0]) or 1
        panel.set_xlim(steps[0] - margin, steps[-1] + margin)
        if one.metric.startswith(_SHARES):
            panel.set_ylim(-0.03, 1.03)
    for i, panel in enumerate(axes.flat):
        if i >= len(series):
            panel.axis("off")
        elif i + columns >= len(series):  # the lowest panel of its column
            panel.set_xlabel("step", fontsize=8)
    if any(one.spreads for one in series):
        figure.suptitle("bars: one standard error to either side", fontsize=8)
    return figure
