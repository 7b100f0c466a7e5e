"""Gradients of expert tables from their factors, and their norm: launches of the kernels in rows.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from titan_peer.ops import settings
from titan_peer.ops.checks import require_contiguous, require_pairs_fit
from titan_peer.ops.sorted_pairs import SortedPairs
from titan_peer.ops.triton import pairs, rows, tuning

_power_of_2 = triton.next_power_of_2


def sort_pairs(indices: Tensor, num_experts: int) -> SortedPairs:
    """As the reference's, but order, row_ids and run_starts have the largest possible lengths, [P], [P] and [P + 1]
    with P = T * K; the contents after the present pairs, and after the runs, are undefined."""
    P, device = indices.numel(), indices.device
    require_pairs_fit(P, num_experts)
    wanted = indices.reshape(-1)
    # int32 halves the number of the sort's passes; absent pairs go last, so that the present ones begin at 0
    keys, order = torch.where(wanted < 0, num_experts, wanted).int().sort(stable=True)
    starts = (keys[1:] != keys[:-1]) & (keys[1:] < num_experts)
    first = keys[:1] < num_experts
    runs = torch.cat([first, starts]).cumsum(0, dtype=torch.int32)
    row_ids = torch.empty(P, dtype=torch.int32, device=device)
    run_starts = torch.empty(P + 1, dtype=torch.int32, device=device)
    num_rows = torch.empty((), dtype=torch.int32, device=device)
    block = 1024
    with torch.cuda.device_of(indices):
        pairs.mark_runs[(triton.cdiv(P + 1, block),)](
            keys, runs, row_ids, run_starts, num_rows, P, num_experts, BLOCK=block
        )
    return SortedPairs(order.int(), row_ids, run_starts, num_rows)


def row_launch(
    kernel: str, pairs: SortedPairs, weights: Tensor, vectors: Tensor, table: Tensor | None = None
) -> dict[str, int]:
    """Shapes and launch of a kernel over gradient rows: its constants, and the number of programs under "programs"."""
    (K, E), D = weights.shape[1:], vectors.shape[1]
    problem = tuning.problem(kernel, vectors if table is None else table, K, E, D)
    launch = tuning.launch_for(problem, vectors.device)
    block_d = min(_power_of_2(D), 4096)
    most_rows = pairs.order.numel() if table is None else min(pairs.order.numel(), table.shape[0])
    units = most_rows * E * triton.cdiv(D, block_d)
    return {
        "programs": tuning.num_programs(vectors.device, launch.num_warps, units),
        "K": K,
        "E": E,
        "D": D,
        "BLOCK_P": launch.block,
        "BLOCK_D": block_d,
        "num_warps": launch.num_warps,
    }


def rows_last_contiguous(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


def table_gradient(
    pairs: SortedPairs, weights: Tensor, vectors: Tensor, out: Tensor, *, compact: bool = False, add: bool = False
) -> None:
    require_contiguous("out", out)
    constants = row_launch("table_gradient", pairs, weights, vectors, out)
    vectors = rows_last_contiguous(vectors)
    programs = constants.pop("programs")
    # A small table's runs are long: several programs share a run, each writing into a part of its own.
    splits = 1 if compact else tuning.num_splits(out.device, programs, 16)
    parts = out if splits == 1 else torch.zeros(splits, *out.shape, dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        rows.write_gradient[(programs * splits,)](
            pairs.order,
            pairs.row_ids,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            parts,
            vectors.stride(0),
            out.numel(),
            COMPACT=compact,
            ADD=add and splits == 1,
            SPLITS=splits,
            **constants,
        )
    if splits > 1:
        out.add_(parts.sum(0)) if add else out.copy_(parts.sum(0))


def dense_gradients(indices: Tensor, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    table = factors[0][2]
    K, E, D = indices.shape[1], table.shape[1], table.shape[2]
    launch = tuning.launch_for(tuning.problem("table_gradient", table, K, E, D), table.device)
    if settings.use_atomics(launch.variant == "atomic"):
        for weights, vectors, out in factors:
            _add_gradient(indices, weights, vectors, out)
        return
    sorted_pairs = sort_pairs(indices, table.shape[0])
    for weights, vectors, out in factors:
        table_gradient(sorted_pairs, weights, vectors, out)


def _add_gradient(indices: Tensor, weights: Tensor, vectors: Tensor, out: Tensor) -> None:
    (K, E), D, P = weights.shape[1:], vectors.shape[1], indices.numel()
    require_pairs_fit(P, out.shape[0])
    require_contiguous("out", out)
    if P == 0:
        return
    vectors = rows_last_contiguous(vectors)
    total = out if out.dtype == torch.float32 else torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    block_p, block_d = 4, min(_power_of_2(D), 1024)
    with torch.cuda.device_of(out):
        rows.add_gradient[(triton.cdiv(P, block_p), E * triton.cdiv(D, block_d))](
            indices.contiguous(),
            weights.contiguous(),
            vectors,
            total,
            vectors.stride(0),
            P,
            K=K,
            E=E,
            D=D,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
        )
    if total is not out:
        out.copy_(total)


def row_norm_squared(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Tensor:
    constants = row_launch("row_norm", pairs, weights, vectors)
    vectors = rows_last_contiguous(vectors)
    programs = constants.pop("programs")
    squares = torch.empty(programs, dtype=torch.float64, device=vectors.device)
    with torch.cuda.device_of(vectors):
        rows.sum_squares[(programs,)](
            pairs.order,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            squares,
            vectors.stride(0),
            **constants,
        )
    return squares.sum().float()
