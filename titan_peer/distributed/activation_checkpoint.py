"""Activation checkpointing: the backward pass recomputes the activations of blocks instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from titan_peer.config.job import ActivationCheckpoint
from titan_peer.model import Transformer

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Contexts for the forward pass and for its recomputation."""

KEPT_OPS = (
    "titan_peer::product_key_retrieve",
    "titan_peer::peer_experts",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)
"""Ops whose outputs `selective_op` keeps: attention, retrieval and experts, which compute much for the size of their
outputs. FlexAttention, a higher-order op without a schema, is kept too."""


def apply_activation_checkpointing(model: Transformer, config: ActivationCheckpoint, *, compiled: bool) -> None:
    """Wrap the blocks that `config` selects.

    Args:
        compiled: blocks are compiled after this; the compiler sees the recomputation and writes each buffer only once.
    """
    if config.mode == "none":
        return
    for i, block in enumerate(model.layers):
        if config.mode == "selective" and i % config.every_n_layers:
            continue
        contexts = _keep_chosen_ops if config.mode == "selective_op" else None
        if not compiled:
            contexts = partial(_with_buffers_kept, contexts or _keep_nothing, block)
        options: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
        model.layers[i] = checkpoint_wrapper(block, preserve_rng_state=True, **options)


def _keep_nothing() -> Contexts:
    return nullcontext(), nullcontext()


def _keep_chosen_ops() -> Contexts:
    def policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = getattr(op, "_schema", None) is not None and op._schema.name in KEPT_OPS
        keep = keep or op is torch._higher_order_ops.flex_attention
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _with_buffers_kept(inner: Any, block: nn.Module) -> Contexts:
    forward, repetition = inner()
    return forward, _buffers_kept(block, repetition)


@contextmanager
def _buffers_kept(block: nn.Module, inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Restore the buffers afterwards: a recomputation must not count its batch twice in running statistics."""
    saved = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        with inner:
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
