"""Exact top-k over a Cartesian product of sub-keys (arXiv 2407.04153, section 2.1; product keys: arXiv 1907.05242)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titan_peer.ops import reference
from titan_peer.ops.backends import backend_for
from titan_peer.ops.checks import require_dtype, require_one_device, require_pairs_fit


def product_key_topk(scores: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best sums of one score per axis, over all combinations, exactly and without forming all combinations.

    Args:
        scores: one tensor [..., n_c] for each of the C axes, of any sizes.
        k: how many; at most n_1 * ... * n_C.
    Returns:
        values [..., k], descending, differentiable in the scores; indices int64 [..., k], row-major over the axes
        (i_1 * n_2 + i_2 for two).
    Raises:
        ValueError: k is out of range.
    """
    return reference.product_key_topk(scores, k)


def product_key_retrieve(queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """`product_key_topk` of the scores of queries against sub-keys, without storing the scores.

    Args:
        queries: [T, H, Q]; a query is split over the axes, Q = sum Q_c.
        sub_keys: one tensor [H, n_c, Q_c] per axis, or [1, n_c, Q_c] if the heads share them.
        k: experts per head.
    Returns:
        values [T, H, k] (float32; float64 for float64 queries), descending; indices int64 [T, H, k]. Scores have the
        dtype of the values, also for bfloat16 and float16 queries. The backward touches only the chosen sub-keys.
    Raises:
        ValueError: k or a shape is invalid.
    """
    reference.check_k([keys.shape[1] for keys in sub_keys], k)
    if sum(keys.shape[2] for keys in sub_keys) != queries.shape[2]:
        dims = [keys.shape[2] for keys in sub_keys]
        raise ValueError(f"sub_keys have the dims {dims}: their sum must be that of a query, {queries.shape[2]}")
    for axis, keys in enumerate(sub_keys):
        if keys.shape[0] not in (1, queries.shape[1]):
            raise ValueError(
                f"sub_keys[{axis}] has {keys.shape[0]} sets: must be 1 or one per head, {queries.shape[1]}"
            )
        require_one_device(queries=queries, sub_keys=keys)
    if queries.is_floating_point() and any(keys.dtype != queries.dtype for keys in sub_keys):
        sub_keys = [keys.to(queries.dtype) for keys in sub_keys]
    return _retrieve(queries, list(sub_keys), k)


@torch.library.custom_op("titan_peer::product_key_retrieve", mutates_args=())
def _retrieve(queries: Tensor, sub_keys: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    require_dtype("queries", queries, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    for keys in sub_keys:  # chosen sub-keys are numbered over all heads
        require_pairs_fit(queries.shape[0] * queries.shape[1] * k, keys.shape[0] * keys.shape[1])
    with torch.autocast(queries.device.type, enabled=False):
        return backend_for(queries).retrieve_forward(queries, sub_keys, k)


@_retrieve.register_fake
def _(queries: Tensor, sub_keys: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], k)
    values = queries.new_empty(shape, dtype=reference.accumulation_dtype(queries.dtype))
    return values, queries.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("titan_peer::product_key_retrieve_backward", mutates_args=())
def _retrieve_backward(
    dvalues: Tensor, indices: Tensor, queries: Tensor, sub_keys: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast(queries.device.type, enabled=False):
        return backend_for(queries).retrieve_backward(dvalues, indices, queries, sub_keys)


@_retrieve_backward.register_fake
def _(dvalues: Tensor, indices: Tensor, queries: Tensor, sub_keys: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(queries), [torch.empty_like(keys) for keys in sub_keys]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, sub_keys, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], queries, *sub_keys)


def _backward(ctx: Any, dvalues: Tensor, _: Tensor) -> tuple[Tensor, list[Tensor], None]:
    indices, queries, *sub_keys = ctx.saved_tensors
    dqueries, dkeys = _retrieve_backward(dvalues.contiguous(), indices, queries, sub_keys)
    return dqueries, dkeys, None


_retrieve.register_autograd(_backward, setup_context=_setup_context)
