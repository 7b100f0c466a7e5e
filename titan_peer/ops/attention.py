"""Causal attention over packed documents: FlexAttention on CUDA, scaled-dot-product attention elsewhere.

FlexAttention has no backward on CPU. SDPA's CPU flash kernel has one and takes a boolean mask, but needs equal head
dims for keys and values, so shorter values are padded with zeros there (without the flash kernel, SDPA stores the S x S
scores).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# None means plain causal, which needs no mask on the SDPA path.
AttentionMask = BlockMask | Tensor | None

# FlexAttention is fused only when compiled; inside a compiled block this inner compile is inlined.
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


_BLOCK = 128  # tokens per block of the mask
# Bytes from which PyTorch's own choices fit: the A100's, for which they are made. Capability 8.6, 8.9 and 12.0 have 99
# KiB.
_ENOUGH_SHARED_MEMORY = 160 << 10
_RESERVE = 10 << 10  # shared memory for everything but the tiles


def attention_backend(device: torch.device, qk_head_dim: int = 0, v_head_dim: int = 0, element_size: int = 2) -> str:
    """Which attention path serves `device` and head dims, in words for a log line."""
    if device.type == "cuda":
        options = flex_kernel_options(qk_head_dim, v_head_dim, element_size, _shared_memory(device))
        tiles = "" if options is None else f", smaller tiles for head dim {qk_head_dim}"
        return f"FlexAttention (compiled, block-sparse document mask{tiles})"
    return f"scaled_dot_product_attention (FlexAttention has no backward on {device.type})"


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program of a kernel can use."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _ENOUGH_SHARED_MEMORY))  # AMD's lack it


def flex_kernel_options(
    qk_head_dim: int, v_head_dim: int, element_size: int, shared_memory: int
) -> dict[str, Any] | None:
    """Tiles and stages of FlexAttention's kernels for GPUs whose shared memory PyTorch's own choice may exceed.

    A forward program holds one tile of queries and, per stage, tiles of keys and values; a backward program holds tiles
    of keys and values and, per stage, of queries and output gradients. On compute capability 8.6 and 8.9 with head dims
    192 and 128, the forward tiles chosen here were the fastest of those that fit (pytorch/pytorch#180278).

    Args:
        shared_memory: bytes that one program can use.
    Returns:
        FlexAttention's `kernel_options`; None if PyTorch's own choice fits.
    """
    if shared_memory >= _ENOUGH_SHARED_MEMORY or qk_head_dim <= 128:
        return None
    row, room = qk_head_dim + v_head_dim, (shared_memory - _RESERVE) // element_size
    forward = ((128, 32, 2, 8), (64, 32, 2, 4), (32, 32, 2, 4), (32, 16, 1, 4), (16, 16, 1, 4))
    backward = ((64, 2, 4), (64, 1, 4), (32, 1, 4), (16, 1, 4))
    fits = (o for o in forward if o[0] * qk_head_dim + o[2] * o[1] * row <= room)
    block_m, block_n, stages, warps = next(fits, forward[-1])
    options = {"fwd_BLOCK_M": block_m, "fwd_BLOCK_N": block_n, "fwd_num_stages": stages, "fwd_num_warps": warps}
    block, stages, warps = next((o for o in backward if o[0] * row * (1 + o[1]) <= room), backward[-1])
    options |= {f"bwd_BLOCK_{side}": block for side in ("M1", "N1", "M2", "N2")}
    return options | {"bwd_num_stages": stages, "bwd_num_warps": warps}


def _is_start(document_ids: Tensor) -> Tensor:
    """bool [B, S]: true where a run of equal ids begins."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return is_start


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart with every document.

    Args:
        document_ids: integer [B, S]; a document is a run of equal ids.
    Returns:
        int64 [B, S], the distance of each token from the first of its run.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return index - torch.where(_is_start(document_ids), index, 0).cummax(dim=1).values


def causal_block_mask(document_ids: Tensor | None, seq_len: int, device: torch.device) -> BlockMask:
    """The mask of `causal_mask` for FlexAttention, made per block from the runs of documents, so nothing of size S x S
    exists.

    Runs are numbered in order. So a block of queries sees some keys of an earlier block of keys if the queries' first
    run is the keys' last run, and all of them if the queries' last run is the keys' first run.
    """
    num_blocks = -(-seq_len // _BLOCK)
    if document_ids is None:
        runs = torch.zeros(1, seq_len, dtype=torch.int32, device=device)
    else:
        runs = _is_start(document_ids).cumsum(1, dtype=torch.int32)  # [B, S]
    after_the_end = (runs[:, -1:] + 1).expand(-1, num_blocks * _BLOCK - seq_len)
    blocks = torch.cat([runs, after_the_end], dim=1).unflatten(1, (num_blocks, _BLOCK))
    first, last = blocks[:, None, :, 0], blocks[:, None, :, -1]  # [B, 1, blocks]
    index = torch.arange(num_blocks, device=device)
    is_before = index[:, None] > index  # [blocks of queries, blocks of keys]
    whole = is_before & (last[..., None] == first[..., None, :])
    some = (is_before & (first[..., None] == last[..., None, :])) | (index[:, None] == index)

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        causal = q >= kv
        return causal if document_ids is None else causal & (runs[b, q] == runs[b, kv])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~whole), *_ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(seq_len, seq_len)
    )


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For bool [..., n]: the number of true entries, int32 [...], and all indices, int32 [..., n], true entries
    first."""
    return mask.sum(-1, dtype=torch.int32), mask.int().argsort(dim=-1, descending=True, stable=True).int()


def causal_mask(document_ids: Tensor | None, batch_size: int, seq_len: int, device: torch.device) -> AttentionMask:
    """The mask of causal attention within documents.

    Args:
        document_ids: integer [B, S], or None for one document per sequence.
    """
    if device.type == "cuda":
        global _flex_shared_memory
        _flex_shared_memory = _shared_memory(device)
        return causal_block_mask(document_ids, seq_len, device)
    if document_ids is None:
        return None
    runs = _is_start(document_ids).cumsum(1, dtype=torch.int32)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    return (causal & (runs[:, :, None] == runs[:, None, :]))[:, None]  # [B, 1, S, S]


_flex_shared_memory = (
    _ENOUGH_SHARED_MEMORY  # the GPU's; read when the mask is made, since a compiled block cannot read it
)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v.

    Args:
        q, k: [B, H, S, qk_head_dim]
        v: [B, H, S, v_head_dim]
        mask: what `causal_mask` returned for these shapes and this device.
    Returns:
        [B, H, S, v_head_dim], dtype of q.
    """
    if isinstance(mask, BlockMask):
        options: Any = flex_kernel_options(q.shape[-1], v.shape[-1], q.element_size(), _flex_shared_memory)
        return _compiled_flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    v_head_dim = v.shape[-1]
    if v_head_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - v_head_dim))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :v_head_dim]
