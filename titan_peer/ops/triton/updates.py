"""Row-wise updates of expert tables: launches of the kernels in adamw.py and normalized.py."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from titan_peer.ops.checks import require_adamw_state, require_momentum
from titan_peer.ops.missed_steps import MissedSteps
from titan_peer.ops.reference import DAMPING, ITERATIONS
from titan_peer.ops.sorted_pairs import SortedPairs
from titan_peer.ops.triton import adamw, normalized, tuning
from titan_peer.ops.triton.table_gradients import row_launch, rows_last_contiguous


def _missed(missed: MissedSteps | None, stand_in: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int | float, ...]]:
    """What the kernels take for missed steps: last_use and the table; step, the table's length, three logarithms."""
    if missed is None:
        return (stand_in, stand_in), (0, 0, 0.0, 0.0, 0.0)
    table = missed.table()
    return (missed.last_use, table), (missed.step, table.shape[0], *missed.log2())


def _on_device(grad_scale: Tensor | float, param: Tensor) -> Tensor:
    if isinstance(grad_scale, Tensor):
        return grad_scale
    return torch.full((), grad_scale, dtype=torch.float32, device=param.device)


def _mark_used(pairs: SortedPairs, missed: MissedSteps | None) -> None:
    if missed is None:
        return
    block = 1024
    programs = tuning.num_programs(missed.last_use.device, 4, triton.cdiv(pairs.row_ids.numel(), block))
    adamw.mark_used[(programs,)](missed.last_use, pairs.row_ids, pairs.num_rows, missed.step, BLOCK=block)


def rowwise_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    seed: int,
    missed: MissedSteps | None = None,
) -> None:
    require_adamw_state(param, exp_avg, exp_avg_sq)
    constants = row_launch("adamw", pairs, weights, vectors, param)
    vectors = rows_last_contiguous(vectors)
    programs = constants.pop("programs")
    pointers, scalars = _missed(missed, param)
    kernel = adamw.adamw_row if exp_avg_sq.ndim == 1 else adamw.adamw_element
    with torch.cuda.device_of(param):
        kernel[(programs,)](
            param,
            exp_avg,
            exp_avg_sq,
            pairs.order,
            pairs.row_ids,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            _on_device(grad_scale, param),
            *pointers,
            vectors.stride(0),
            float(1 - lr * weight_decay),
            float(lr / bias_correction1),
            float(beta1),
            float(beta2),
            math.sqrt(bias_correction2),
            float(eps),
            seed,
            *scalars,
            **constants,
            CATCH_UP=missed is not None,
        )
        _mark_used(pairs, missed)


def rowwise_normalized_(
    param: Tensor,
    momentum: Tensor | None,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float,
    step_size: float,
    beta: float,
    eps: float,
    decay: float,
    seed: int,
    missed: MissedSteps | None = None,
) -> None:
    require_momentum(param, momentum)
    constants = row_launch("normalized", pairs, weights, vectors, param)
    vectors = rows_last_contiguous(vectors)
    programs, E = constants.pop("programs"), constants["E"]
    del constants["BLOCK_P"]
    if E > 1:  # tl.dot takes tiles of 16 or more
        block_e = max(16, triton.next_power_of_2(E))
        constants["BLOCK_D"] = max(16, min(constants["BLOCK_D"], 2048 // block_e))
    pointers, scalars = _missed(missed, param)
    with torch.cuda.device_of(param):
        normalized.normalized[(programs,)](
            param,
            param if momentum is None else momentum,
            pairs.order,
            pairs.row_ids,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            _on_device(grad_scale, param),
            *pointers,
            vectors.stride(0),
            float(decay),
            float(step_size),
            float(beta),
            max(eps**2, 1e-37),
            DAMPING,
            seed,
            *scalars,
            **constants,
            BLOCK_E=block_e if E > 1 else 1,
            ITERATIONS=ITERATIONS,
            MOMENTUM=momentum is not None,
            CATCH_UP=missed is not None,
        )
        _mark_used(pairs, missed)
