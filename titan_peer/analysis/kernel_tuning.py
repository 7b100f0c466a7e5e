"""Measuring how the GPU kernels of a job are best launched.

For every kernel of the expert operators it times the launches near the built-in rule's, and the other ways to do the
same (atomic or sorted gradients, scores by tiles or by matmul), at the job's shapes and dtypes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from titan_peer.config.job import JobConfig
from titan_peer.config.optimizer import Optimizer
from titan_peer.distributed.parallelize import compute_dtype
from titan_peer.ops import MissedSteps, set_table_gradient
from titan_peer.ops.sorted_pairs import SortedPairs

if TYPE_CHECKING:
    from titan_peer.ops.triton.tuning import Launch, Problem

logger = logging.getLogger("titan_peer")


ADAMW: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
ADAMW |= {"bias_correction1": 0.1, "bias_correction2": 0.05}


@dataclass(frozen=True)
class Result:
    """What the measurement of one problem found."""

    best: Launch
    best_ms: float
    rule_ms: float
    """Of the built-in rule's launch."""


Task = tuple["Problem", Callable[[], object]]


def _expert_tasks(config: JobConfig, device: torch.device, T: int) -> Iterator[Task]:
    """Calls of the expert operator and of the update of its tables, in a step of one PEER layer with T tokens."""
    from titan_peer.ops import triton as kernels
    from titan_peer.ops.triton.tuning import problem

    peer, optimizer, D = config.model.peer, config.optimizer, config.model.dim
    K, E, N = peer.num_heads * peer.num_experts_per_tok, peer.expert_hidden_size, peer.num_experts
    dtype = compute_dtype(config.training.mixed_precision_param, device)
    x, gates = torch.randn(T, D, device=device, dtype=dtype), torch.rand(T, K, device=device)
    indices, z = torch.randint(N, (T, K), device=device), torch.randn(T, K, E, device=device)
    down, up = torch.randn(N, E, D, device=device), torch.randn(N, E, D, device=device)
    activation = peer.activation

    yield (
        problem("experts_forward", down, K, E, D),
        lambda: kernels.peer_forward(x, indices, gates, down, up, activation),
    )
    yield (
        problem("experts_backward", up, K, E, D),
        lambda: kernels.peer_backward(x, x, indices, gates, z, down, up, activation),
    )
    if optimizer.expert_update == "dense":
        yield problem("table_gradient", up, K, E, D), lambda: kernels.dense_gradients(indices, [(z, x, up)])
        return
    pairs = kernels.sort_pairs(indices, N)
    yield problem("row_norm", x, K, E, D), lambda: kernels.row_norm_squared(pairs, z, x)
    yield _update_task(optimizer, down, pairs, z, x)


def _update_task(optimizer: Optimizer, table: Tensor, pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Task:
    """The call of the row-wise update of a table [N, E, D]."""
    from titan_peer.ops import triton as kernels
    from titan_peer.ops.triton.tuning import problem

    N, E, D = table.shape
    K, moment_dtype = weights.shape[1], getattr(torch, optimizer.expert_moment_dtype)
    beta1, beta2 = ADAMW["beta1"], ADAMW["beta2"]
    last_use = torch.zeros(N, dtype=torch.int32, device=table.device)
    missed = MissedSteps(last_use, 1, beta1, beta2, 1.0) if optimizer.expert_catch_up else None
    exp_avg = torch.zeros_like(table, dtype=moment_dtype)
    arguments: dict[str, Any] = {"grad_scale": 1.0, "seed": 1, "missed": missed}
    if optimizer.expert_optimizer == "normalized":
        momentum = exp_avg if optimizer.expert_momentum else None
        arguments |= {"step_size": 1e-3, "beta": beta1, "eps": 1e-8, "decay": 1.0}
        return problem("normalized", table, K, E, D), lambda: kernels.rowwise_normalized_(
            table, momentum, pairs, weights, vectors, **arguments
        )
    by_row = optimizer.expert_second_moment == "row"
    exp_avg_sq = torch.zeros(N, device=table.device) if by_row else torch.zeros_like(exp_avg)
    return problem("adamw", table, K, E, D), lambda: kernels.rowwise_adamw_(
        table, exp_avg, exp_avg_sq, pairs, weights, vectors, **ADAMW, **arguments
    )


def _retrieval_tasks(config: JobConfig, device: torch.device, T: int) -> Iterator[Task]:
    """Calls of product-key retrieval, forward and backward, in a step of T tokens; all axes use the first axis'
    launch."""
    from titan_peer.ops import triton as kernels
    from titan_peer.ops.triton.tuning import problem

    peer = config.model.peer
    H, k, axis_dim = peer.num_heads, peer.num_experts_per_tok, peer.query_dim // len(peer.product_key_dim)
    queries = torch.randn(T, H, peer.query_dim, device=device)  # float32 in every precision, as the sub-keys are
    key_sets, n = H if peer.keys_per_head else 1, peer.product_key_dim[0]
    sub_keys = [torch.randn(key_sets, size, axis_dim, device=device) for size in peer.product_key_dim]
    dvalues = torch.randn(T, H, k, device=device)
    chosen = torch.randint(peer.num_experts, (T, H, k), device=device)
    gradient = torch.empty(key_sets * n, 1, axis_dim, device=device)
    yield (
        problem("best_sub_keys", sub_keys[0], min(k, n), 1, axis_dim),
        lambda: kernels.retrieve_forward(queries, sub_keys, k),
    )
    yield (
        problem("table_gradient", gradient, k, 1, axis_dim),
        lambda: kernels.retrieve_backward(dvalues, chosen, queries, sub_keys),
    )


def gpu_milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call, with the GPU's cache cleared before every call."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def host_milliseconds(run: Callable[[], object]) -> float:
    """Time of one call; used for interpreted kernels."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def tune(
    config: JobConfig, device: torch.device, num_tokens: int, milliseconds: Callable[[Callable[[], object]], float]
) -> dict[Problem, Result]:
    """Time every candidate launch of the job's kernels; candidates that the device cannot run are skipped.

    Args:
        num_tokens: tokens in a micro-batch.
        milliseconds: measures the time of a call.
    """
    from triton.runtime.errors import OutOfResources

    from titan_peer.ops.triton import tuning

    results: dict[Problem, Result] = {}
    set_table_gradient("fastest")  # so that a launch's variant decides
    try:
        for problem, run in chain(*(tasks(config, device, num_tokens) for tasks in (_expert_tasks, _retrieval_tasks))):
            times: dict[Launch, float] = {}
            rule = tuning.by_rule(problem)
            launches = dict.fromkeys([rule, *tuning.candidates(problem)])
            for launch in tqdm(launches, desc=problem.kernel, leave=False, disable=None):
                with tuning.forced(problem, launch):
                    try:
                        times[launch] = milliseconds(run)
                    except OutOfResources as error:
                        logger.info("%s: %s cannot be launched (%s)", problem, launch, error)
            best = min(times, key=times.__getitem__)
            results[problem] = Result(best, times[best], times.get(rule, float("inf")))
            logger.info("%s: %s, %.3f ms (by rule %.3f)", problem, best, times[best], results[problem].rule_ms)
    finally:
        set_table_gradient(config.optimizer.table_gradient)
    return results
