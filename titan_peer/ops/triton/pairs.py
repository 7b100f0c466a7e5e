"""A kernel that finds the runs of sorted (token, expert) pairs on the device; the host does not learn their number."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def mark_runs(
    expert_ptr,
    run_ptr,
    row_id_ptr,
    run_start_ptr,
    num_rows_ptr,
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
):
    """Row ids, run starts and their number from sorted experts.

    Grid: ceil((P + 1) / BLOCK). A program owns BLOCK places of the sorted order and writes the runs that start at them;
    the place after the last present pair ends the last run. Reads: expert int32 [P] ascending (num_experts stands for
    an absent pair), run int32 [P], the number of runs started so far. Writes: row_id int32 [R], run_start int32 [R +
    1], num_rows int32 [1].
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_pair = i < num_pairs
    has_previous = (i > 0) & (i <= num_pairs)
    expert = tl.load(expert_ptr + i, mask=is_pair, other=num_experts)
    previous = tl.load(expert_ptr + i - 1, mask=has_previous, other=-1)
    is_start = is_pair & (expert < num_experts) & (expert != previous)
    run = tl.load(run_ptr + i, mask=is_start, other=1) - 1
    tl.store(row_id_ptr + run, expert, mask=is_start)
    tl.store(run_start_ptr + run, i, mask=is_start)
    is_end = (i <= num_pairs) & (expert == num_experts) & (previous < num_experts)
    num_rows = tl.load(run_ptr + i - 1, mask=is_end & has_previous, other=0)
    tl.store(run_start_ptr + num_rows, i, mask=is_end)
    tl.store(num_rows_ptr + num_rows * 0, num_rows, mask=is_end)
