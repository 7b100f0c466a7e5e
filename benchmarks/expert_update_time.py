"""What one update of an expert table costs, by kind of update, on the same rows in turns.

A turn is one step: every kind updates the rows that the step's random choice of experts touches. With few tokens
beside the number of experts nearly all of these rows have missed steps. Only the pass over the rows is timed, not the
sort of the pairs, which all kinds share. Tables are touched once before, so that no kind pays for new memory. On a CPU
times are the processor's (of all threads together), which other programs disturb least.

Examples:
    python benchmarks/expert_update_time.py
    python benchmarks/expert_update_time.py --device cuda --tokens 16384 --dim 1024
    python benchmarks/expert_update_time.py --kinds adamw adamw_catch_up --steps 20 --output /tmp/trial
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import RESULTS, markdown_table, synchronize, write_results
from torch import Tensor

from titan_peer.common.command_line import FlagParser
from titan_peer.ops import MissedSteps, rowwise_adamw_, rowwise_normalized_
from titan_peer.ops.backends import backend_for
from titan_peer.ops.sorted_pairs import SortedPairs

LR, BETA1, BETA2 = 1e-3, 0.9, 0.95
Update = Callable[[int, SortedPairs, Tensor, Tensor], None]
"""Makes step t, from 1 on, on the rows of the sorted pairs, from weights [T, K, E] and vectors [T, D]."""


class Tables:
    """One table, and the states of all kinds of updates, which share what has the same shape and dtype."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shape, self.device = (options.experts, options.hidden_size, options.dim), options.device
        self.param = self._ones(torch.float32)
        self._states: dict[tuple[str, torch.dtype], Tensor] = {}

    def _ones(self, dtype: torch.dtype) -> Tensor:
        return torch.full(self.shape, 1e-3, dtype=dtype, device=self.device)

    def state(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._states.setdefault((name, dtype), self._ones(dtype))

    def adamw(self, *, catch_up: bool, moments: torch.dtype = torch.float32, by_row: bool = False) -> Update:
        exp_avg = self.state("exp_avg", moments)
        rows = self.shape[0]
        exp_avg_sq = torch.ones(rows, device=self.device) if by_row else self.state("exp_avg_sq", moments)
        last_use = torch.zeros(rows, dtype=torch.int32, device=self.device)

        def update(step: int, pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> None:
            rowwise_adamw_(
                self.param,
                exp_avg,
                exp_avg_sq,
                pairs,
                weights,
                vectors,
                **{"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": 1e-8, "weight_decay": 0.0},
                bias_correction1=1 - BETA1**step,
                bias_correction2=1 - BETA2**step,
                seed=step,
                missed=MissedSteps(last_use, step, BETA1, BETA2, 1.0) if catch_up else None,
            )

        return update

    def normalized(self, *, momentum: torch.dtype | None, catch_up: bool = True) -> Update:
        state = None if momentum is None else self.state("exp_avg", momentum)
        last_use = torch.zeros(self.shape[0], dtype=torch.int32, device=self.device)

        def update(step: int, pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> None:
            missed = MissedSteps(last_use, step, BETA1, 1.0, 1.0) if catch_up and state is not None else None
            rowwise_normalized_(
                self.param,
                state,
                pairs,
                weights,
                vectors,
                **{"lr": LR, "beta": BETA1, "eps": 1e-8, "weight_decay": 0.0},
                seed=step,
                missed=missed,
            )

        return update


KINDS: dict[str, Callable[[Tables], Update]] = {
    "adamw": lambda tables: tables.adamw(catch_up=False),
    "adamw_catch_up": lambda tables: tables.adamw(catch_up=True),
    "adamw_small_state": lambda tables: tables.adamw(catch_up=False, moments=torch.bfloat16, by_row=True),
    "adamw_small_state_catch_up": lambda tables: tables.adamw(catch_up=True, moments=torch.bfloat16, by_row=True),
    "normalized": lambda tables: tables.normalized(momentum=torch.float32),
    "normalized_bfloat16": lambda tables: tables.normalized(momentum=torch.bfloat16),
    "normalized_no_momentum": lambda tables: tables.normalized(momentum=None),
}


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--experts", type=int, default=1 << 20)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--places", type=int, default=32, help="experts per token: heads x k")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden_size", type=int, default=1, help="E, of an expert")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for table and JSON")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_device(options.device)
    tables = Tables(options)
    updates = {kind: KINDS[kind](tables) for kind in options.kinds}
    weights = torch.randn(options.tokens, options.places, options.hidden_size)
    vectors = torch.randn(options.tokens, options.dim)
    times: dict[str, list[float]] = {kind: [] for kind in updates}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    rows = 0
    for step in range(1, options.steps + 1):
        pairs = backend_for(weights).sort_pairs(
            torch.randint(options.experts, (options.tokens, options.places)), options.experts
        )
        rows += int(pairs.num_rows)
        order = list(updates.items())
        for kind, update in order if step % 2 else reversed(order):  # no kind always comes first
            synchronize(options.device)
            start = clock()
            update(step, pairs, weights, vectors)
            synchronize(options.device)
            times[kind].append(1e3 * (clock() - start))

    sums = {kind: sum(spent) for kind, spent in times.items()}
    medians = {kind: statistics.median(spent) for kind, spent in times.items()}
    first = options.kinds[0]
    header = ["update", "all steps (s)", "median (ms)", "sum against the first", "median against the first"]
    table = [
        [
            kind,
            f"{sums[kind] / 1e3:.2f}",
            f"{medians[kind]:.2f}",
            *(f"{x[kind] / x[first]:.3f}x" for x in (sums, medians)),
        ]
        for kind in updates
    ]
    setting = (
        f"{options.steps} updates of one table, {options.experts:,} experts of {options.hidden_size} x {options.dim}, "
        f"{options.tokens:,} tokens x {options.places} places, {rows / options.steps:,.0f} rows per update"
    )
    text = f"{setting}.\n\n{markdown_table(header, table)}"
    write_results(
        "expert-update-time", options.device, text, {"setting": setting, "milliseconds": times}, options.output
    )
    print(text)


if __name__ == "__main__":
    main()
