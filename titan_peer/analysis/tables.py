"""An analysis as tables on the terminal."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from titan_peer.analysis.analyze import BYTES_PER_NUMBER, Analysis
from titan_peer.analysis.model_size import ComponentSize
from titan_peer.common.units import bytes_text, count_text
from titan_peer.experts.measure import usage_table


def print_tables(analysis: Analysis) -> None:
    """Print the analysis on standard output, as wide as the terminal (120 columns where there is none)."""
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
    """The rows; equal blocks next to each other become one row, "block 0 to 4, each", with the numbers of each of
    them."""
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
