"""Causal attention over packed documents: FlexAttention on CUDA, scaled-dot-product attention elsewhere.

FlexAttention has no backward on CPU; SDPA's CPU flash kernel has one and takes a boolean mask, but wants equal head
dims for keys and values, so shorter values are padded with zeros there (without it SDPA stores the S x S scores).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# None means plain causal, which needs no mask on the SDPA path.
AttentionMask = BlockMask | Tensor | None

# FlexAttention is fused only when compiled; inside a compiled block this inner compile is inlined.
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def attention_backend(device: torch.device) -> str:
    """Which attention path serves `device`, in words for a log line."""
    if device.type == "cuda":
        return "FlexAttention (compiled, block-sparse document mask)"
    return f"scaled_dot_product_attention (FlexAttention has no backward on {device.type})"


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart with every document.

    Args:
        document_ids: integer [B, S]; a document is a run of equal ids.
    Returns:
        int64 [B, S], the distance of each token from the first of its run.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def causal_mask(document_ids: Tensor | None, batch_size: int, seq_len: int, device: torch.device) -> AttentionMask:
    """The mask of causal attention that does not look over document borders.

    Args:
        document_ids: integer [B, S], or None for one document a sequence.
    """
    if device.type == "cuda":

        def same_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            causal = q >= kv
            return causal if document_ids is None else causal & (document_ids[b, q] == document_ids[b, kv])

        mask_batch = None if document_ids is None else batch_size
        return create_block_mask(same_document, mask_batch, None, seq_len, seq_len, device=str(device))
    if document_ids is None:
        return None
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :]))[:, None]  # [B, 1, S, S]


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
        return _compiled_flex_attention(q, k, v, block_mask=mask, scale=scale)
    v_head_dim = v.shape[-1]
    if v_head_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - v_head_dim))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :v_head_dim]
