"""Results of evaluations: metrics records, tables for people, and a plot over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "evaluation/"
FAILED = "failed"
_SHARES = ("acc", "exact_match", "f1")  # beginnings of metrics that lie between 0 and 1
_BOOTSTRAP = "bootstrap_std"  # of accuracy, as the evals package gives it


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
    """Broken off, because the job was told to stop, and so neither a success nor a failure."""

    def record(self) -> dict[str, float]:
        """`evaluation/<kind>/<name>/<metric>`: value; a failed evaluation has the metric `failed` = 1."""
        if self.stopped:
            return {}
        stem = f"{PREFIX}{self.kind}/{self.name}/"
        if self.error:
            return {f"{stem}{FAILED}": 1.0}
        return {f"{stem}{metric}": value for metric, value in self.metrics.items() if math.isfinite(value)}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A Markdown table whose columns line up; numbers to the right from column `numbers_from` on."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * w if i < numbers_from else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [c.ljust(w) if i < numbers_from else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def _is_spread(metric: str) -> bool:
    """Whether it says how sure another metric is."""
    return metric == _BOOTSTRAP or metric.endswith("_stderr")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def result_table(results: Sequence[Result]) -> str:
    """One row a metric, for one checkpoint."""
    rows = []
    for result in results:
        if result.error:
            rows.append([result.kind, result.name, FAILED, result.error.splitlines()[0][:80], "", ""])
            continue
        effort = [f"{result.samples:,}", f"{result.seconds:.1f}"]
        for metric, value in result.metrics.items():
            if _is_spread(metric):
                continue
            spread = result.metrics.get(f"{metric}_stderr")
            if metric == "accuracy":
                spread = result.metrics.get(_BOOTSTRAP, spread)
            shown = _number(value) + ("" if spread is None else f" ± {_number(spread)}")
            rows.append([result.kind, result.name, metric, shown, *effort])
            effort = ["", ""]
    return _table(["kind", "evaluation", "metric", "value", "samples", "seconds"], rows, numbers_from=3)


def _series(records: Sequence[dict[str, float]]) -> dict[str, dict[int, float]]:
    """Metric name (without the prefix) -> step -> value, in the order of first appearance."""
    series: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(PREFIX):
                series.setdefault(key.removeprefix(PREFIX), {})[int(record["step"])] = value
    return series


def history_table(records: Sequence[dict[str, float]], max_steps: int = 8) -> str:
    """A run's evaluations: one row a metric, one column a step (the newest `max_steps`).

    Args:
        records: those of metrics.jsonl; what is not of an evaluation is passed over.
    """
    series = _series(records)
    steps = sorted({step for values in series.values() for step in values})[-max_steps:]
    rows = []
    for key, values in series.items():
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if _is_spread(metric) or not any(step in values for step in steps):
            continue
        rows.append([kind, name, metric, *(_number(values[s]) if s in values else "" for s in steps)])
    return _table(["kind", "evaluation", "metric", *(f"step {s}" for s in steps)], rows, numbers_from=3)


def plot_history(records: Sequence[dict[str, float]], output: Path) -> None:
    """Every metric against the step, a small panel each, as a PNG; nothing is written without records."""
    metrics = ((key, values, key.rpartition("/")[2]) for key, values in _series(records).items())
    series = {key: values for key, values, metric in metrics if metric != FAILED and not _is_spread(metric)}
    if not series:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(series))
    num_rows = -(-len(series) // columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(4 * columns, 2.4 * num_rows), layout="constrained", squeeze=False
    )
    steps = sorted({step for values in series.values() for step in values})
    for panel, (key, values) in zip(axes.flat, series.items()):
        panel.plot(list(values), list(values.values()), "o-", linewidth=1.2, markersize=3)
        name, _, metric = key.partition("/")[2].rpartition("/")
        panel.set_title(f"{name}\n{metric}", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        margin = 0.05 * (steps[-1] - steps[0]) or 1
        panel.set_xlim(steps[0] - margin, steps[-1] + margin)
        if metric.startswith(_SHARES):
            panel.set_ylim(-0.03, 1.03)
    for i, panel in enumerate(axes.flat):
        if i >= len(series):
            panel.axis("off")
        elif i + columns >= len(series):  # the lowest of its column
            panel.set_xlabel("step", fontsize=8)
    figure.savefig(output, dpi=110)
    plt.close(figure)
