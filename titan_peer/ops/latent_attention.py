"""MLA's absorbed form (arXiv 2405.04434, 2.1.2): all heads attend to the latents as if they were one key/value head.

In PyTorch for any device and shape; with FlashMLA (extra: flash-mla) for bfloat16 on Hopper GPUs at DeepSeek's shape.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FLASH_LATENT, _FLASH_ROPE = 512, 64  # the only shape that FlashMLA's kernels are made for


def attend_to_latents(q: Tensor, cached: Tensor, mask: Tensor | None, scale: float, kv_lora_rank: int) -> Tensor:
    """softmax(scale * q cached^T + mask) cached[..., :kv_lora_rank].

    Args:
        q: [B, S, H, kv_lora_rank + qk_rope_head_dim], absorbed queries.
        cached: [B, L, kv_lora_rank + qk_rope_head_dim].
        mask: bool [B, 1, S, L]; None: query s sees the first s + 1 latents.
    Returns:
        [B, S, H, kv_lora_rank], weighted sums of latents, dtype of q; scores and softmax are float32.
    """
    S, H = q.shape[1:3]
    if mask is None:
        mask = torch.ones(S, cached.shape[1], dtype=torch.bool, device=q.device).tril()[None, None]
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the scores
        scores = q.flatten(1, 2).float() @ cached.transpose(1, 2).float() * scale  # [B, S * H, L]
    scores = scores.unflatten(1, (S, H)).masked_fill(~mask.transpose(1, 2), float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).flatten(1, 2)
    return (weights @ cached[..., :kv_lora_rank]).unflatten(1, (S, H))


# ---- FlashMLA


class FlashMLASchedule(NamedTuple):
    """How FlashMLA distributes a step's sequences over the GPU; the same for all layers of one step."""

    metadata: Any
    num_splits: Any


def flash_mla_unavailable_reason(
    device: torch.device, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int
) -> str | None:
    """Why FlashMLA cannot serve a cache of this kind, or None if it can."""
    if device.type != "cuda":
        return f"FlashMLA needs CUDA, the model is on {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "FlashMLA's dense decode kernel needs a Hopper GPU (SM90)"
    if dtype != torch.bfloat16:
        return f"FlashMLA needs bfloat16, the model is {str(dtype).removeprefix('torch.')}"
    if (kv_lora_rank, qk_rope_head_dim) != (_FLASH_LATENT, _FLASH_ROPE):
        return (
            f"FlashMLA needs model.mla.kv_lora_rank = {_FLASH_LATENT} and qk_rope_head_dim = {_FLASH_ROPE}, the model has "
            f"{kv_lora_rank} and {qk_rope_head_dim}"
        )
    try:
        importlib.import_module("flash_mla")
    except ImportError as error:
        return f"FlashMLA is not installed (extra: flash-mla; {error})"
    return None


def flash_mla_schedule(lengths: Tensor, n_heads: int) -> FlashMLASchedule:
    """The schedule of a step in which each sequence has one new token.

    Args:
        lengths: int32 [B], tokens per sequence, including the new one.
    """
    return FlashMLASchedule(*importlib.import_module("flash_mla").get_mla_metadata(lengths, n_heads, 1))


@torch.compiler.disable  # type: ignore[misc]
def flash_mla_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, lengths: Tensor, schedule: FlashMLASchedule, scale: float
) -> Tensor:
    """`attend_to_latents` over a paged cache, one new token per sequence.

    Args:
        q: bfloat16 [B, 1, H, 576].
        pool: bfloat16 [blocks, 64, 576].
        block_table: int32 [B, most blocks of any sequence].
        lengths: int32 [B], tokens per sequence, including the new one.
    Returns:
        bfloat16 [B, 1, H, 512].
    """
    out, _ = importlib.import_module("flash_mla").flash_mla_with_kvcache(
        q.contiguous(),
        pool.unsqueeze(2),
        block_table.contiguous(),
        lengths,
        _FLASH_LATENT,
        *schedule,
        softmax_scale=scale,
        causal=True,
    )
    return out  # type: ignore[no-any-return]
