"""The forward pass with the latent cache: the model's own blocks, with attention that reads what it has cached.

MLA has two forms that give the same (arXiv 2405.04434, section 2.1.2). Expanded: the latents become keys and values of every
head; the least work when many new tokens share that cost (prefill). Absorbed: the heads' queries are mapped into the
latent space and all heads attend to the latents as to one key/value head; the least memory traffic for one new token.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from titan_peer.latent_cache import CacheStep, LatentCache
from titan_peer.model import MLA, Block, Experts, Transformer
from titan_peer.ops import peer_experts
from titan_peer.ops.attention import causal_attention

logger = logging.getLogger("titan_peer")

Form = Literal["expanded", "absorbed"]


class Decoder:
    """Runs a model over new tokens of sequences whose earlier tokens are in a `LatentCache`.

    Args:
        compile: compile the decode step's blocks (the first tokens then take as long as the compiler).
    """

    def __init__(self, model: Transformer, *, compile: bool) -> None:
        self.model = model
        self.device = model.tok_embeddings.weight.device
        self.decode_block = torch.compile(_block) if compile else _block
        for module in model.modules():
            if isinstance(module, Experts) and module.expert_down.device != self.device:
                module.forward = partial(_experts_at_home, module)  # type: ignore[method-assign]

    def new_cache(self, num_blocks: int) -> LatentCache:
        dtype = self.model.layers[0].attention.wkv_a.weight.dtype  # type: ignore[union-attr]
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        return LatentCache(self.model.args, num_blocks, self.device, dtype)  # type: ignore[arg-type]

    def whole(self, tokens: Tensor) -> Tensor:
        """Run whole sequences without a cache: int64 [B, S] -> [B, S, D], normed; padding belongs on the right."""
        rope = self.model.rope[None, : tokens.shape[1]]
        x = self.model.tok_embeddings(tokens)
        for block in self.model.layers:
            x = block(x, rope, None, self.model.shared_experts)
        return self.model.norm(x)

    def __call__(self, tokens: Tensor, step: CacheStep, cache: LatentCache, form: Form | None = None) -> Tensor:
        """Run new tokens, and put their latents into the cache.

        Args:
            tokens: int64 [B, S], what is beyond a sequence's new tokens is anything.
            form: of attention; None takes the absorbed form for one token a sequence and the expanded one for more.
        Returns:
            [B, S, D], normed, ready for the output head.
        """
        model = self.model
        form = form or ("absorbed" if tokens.shape[1] == 1 else "expanded")
        block_forward = self.decode_block if form == "absorbed" else _block
        rope = model.rope[step.positions]  # [B, S, 2, qk_rope_head_dim / 2]
        x = model.tok_embeddings(tokens)
        for block, pool in zip(model.layers, cache.layers):
            assert isinstance(block, Block)
            x = block_forward(block, x, rope, pool, step, form, model.shared_experts)
        return model.norm(x)


def _block(
    block: Block, x: Tensor, rope: Tensor, pool: Tensor, step: CacheStep, form: Form, shared_experts: Experts | None
) -> Tensor:
    """`Block.forward` with cached attention: x [B, S, D] -> [B, S, D]."""
    x = x + _attention(block.attention, block.attention_norm(x), rope, pool, step, form)
    return block.after_attention(x, shared_experts)


def _attention(mla: MLA, x: Tensor, rope: Tensor, pool: Tensor, step: CacheStep, form: Form) -> Tensor:
    """`MLA.forward` over the cached tokens and the new ones: x [B, S, D] -> [B, S, D]; writes the new latents."""
    q_nope, q_rope = mla.queries(x, rope)
    latent, k_rope = mla.latents(x, rope)
    entries = torch.cat([latent, k_rope.squeeze(2)], dim=-1)  # [B, S, kv_lora_rank + qk_rope_head_dim]
    pool.view(-1, pool.shape[-1])[step.slots] = entries.flatten(0, 1).to(pool.dtype)

    if form == "absorbed":
        q = mla.absorbed_queries(q_nope, q_rope)
        cached = pool[step.block_table].flatten(1, 2).to(q.dtype)  # [B, L, kv_lora_rank + qk_rope_head_dim]
        return mla.absorbed_output(attend_to_latents(q, cached, step.mask, mla.softmax_scale, mla.kv_lora_rank))

    if step.mask is not None:
        cached = pool[step.block_table].flatten(1, 2).to(latent.dtype)
        latent, k_rope = cached[..., : mla.kv_lora_rank], cached[:, :, None, mla.kv_lora_rank :]
    k, v = mla.expand(latent, k_rope)
    q = torch.cat([q_nope, q_rope], dim=-1)
    out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), step.mask, mla.softmax_scale)
    return mla.wo(out.transpose(1, 2).flatten(2))


def attend_to_latents(q: Tensor, cached: Tensor, mask: Tensor | None, scale: float, kv_lora_rank: int) -> Tensor:
    """Attention of all heads to one shared key/value head, the latents.

    Args:
        q: [B, S, H, kv_lora_rank + qk_rope_head_dim], absorbed queries.
        cached: [B, L, kv_lora_rank + qk_rope_head_dim].
        mask: bool [B, 1, S, L], or None for causal with S = 1 or L tokens that end with the S new ones.
    Returns:
        [B, S, H, kv_lora_rank], weighted sums of latents.
    """
    S, H = q.shape[1:3]
    if mask is None:
        L = cached.shape[1]
        mask = torch.ones(S, L, dtype=torch.bool, device=q.device).tril()[None, None]
    scores = (q.flatten(1, 2) @ cached.transpose(1, 2)).float() * scale  # [B, S * H, L]
    scores = scores.unflatten(1, (S, H)).masked_fill(~mask.transpose(1, 2), float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).flatten(1, 2)
    return (weights @ cached[..., :kv_lora_rank]).unflatten(1, (S, H))


def _experts_at_home(module: Experts, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    """`Experts.forward` for tables on another device than the model: tokens go there and back, tables stay."""
    home = module.expert_down.device
    at_home = (x.to(home), indices.to(home), gates.to(home))
    return peer_experts(*at_home, module.expert_down, module.expert_up, module.activation).to(x.device)
