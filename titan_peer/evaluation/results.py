"""Results of evaluations: metrics records, tables for people, and a plot over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "evaluation/"
FAILED = "failed"


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

    def record(self) -> dict[str, float]:
        """`evaluation/<kind>/<name>/<metric>`: value; a failed evaluation has the metric `failed` = 1."""
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


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def result_table(results: Sequence[Result]) -> str:
    """One row a metric, for one checkpoint."""
    rows = []
    for result in results:
        if result.error:
            rows.append([result.kind, result.name, FAILED, result.error.splitlines()[0][:80], "", ""])
            continue
        for i, (metric, value) in enumerate(result.metrics.items()):
            effort = [f"{result.samples:,}", f"{result.seconds:.1f}"] if i == 0 else ["", ""]
            rows.append([result.kind, result.name, metric, _number(value), *effort])
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
        if not any(step in values for step in steps):
            continue
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        rows.append([kind, name, metric, *(_number(values[s]) if s in values else "" for s in steps)])
    return _table(["kind", "evaluation", "metric", *(f"step {s}" for s in steps)], rows, numbers_from=3)


def plot_history(records: Sequence[dict[str, float]], output: Path) -> None:
    """Every metric against the step, a small panel each, as a PNG; nothing is written without records."""
    series = {k: v for k, v in _series(records).items() if not k.endswith((f"/{FAILED}", "_stderr", "std"))}
    if not series:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(series))
    num_rows = -(-len(series) // columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(4 * columns, 2.4 * num_rows), layout="constrained", squeeze=False, sharex=True
    )
    for panel in axes.flat[len(series) :]:
        panel.axis("off")
    for panel, (key, values) in zip(axes.flat, series.items()):
        panel.plot(list(values), list(values.values()), "o-", linewidth=1.2, markersize=3)
        name, _, metric = key.partition("/")[2].rpartition("/")
        panel.set_title(f"{name}\n{metric}", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("step", fontsize=8)
    figure.savefig(output, dpi=110)
    plt.close(figure)
