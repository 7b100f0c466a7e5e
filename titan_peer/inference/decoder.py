"""The forward pass with the latent cache: the model's own blocks, with attention that reads what is cached.

MLA has two forms with equal results (arXiv 2405.04434, section 2.1.2). Expanded: the latents are expanded into keys and
values of every head; this is the least work when many new tokens share the cost (prefill). Absorbed: the heads' queries
are mapped into the latent space, and all heads attend to the latents as to one key/value head; this is the least memory
traffic for one new token.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from titan_peer.distributed.parallelize import autocast
from titan_peer.inference.latent_cache import CacheStep, LatentCache
from titan_peer.model import MLA, Block, Experts, Transformer, experts_of, peer_layers, table_parameters
from titan_peer.ops import peer_experts
from titan_peer.ops.attention import causal_attention
from titan_peer.ops.latent_attention import (
    FlashMLASchedule,
    attend_to_latents,
    flash_mla_attention,
    flash_mla_schedule,
    flash_mla_unavailable_reason,
)

logger = logging.getLogger("titan_peer")

Form = Literal["expanded", "absorbed"]


class Decoder:
    """Runs a model over new tokens of sequences whose earlier tokens are in a `LatentCache`.

    It computes as training does: matrices are multiplied in the dtype of the model's head (by autocast if that is not
    float32), everything else is computed in float32.

    Args:
        compile: compile the decode step's blocks (the first tokens then wait for the compiler).
    """

    def __init__(self, model: Transformer, *, compile: bool) -> None:
        self.model, self.compile = model, compile
        self.device = model.tok_embeddings.weight.device
        self.precision = autocast(self.device, model.output.weight.dtype)
        self._bytes_per_step, self._bytes_per_token = _weights_read(model)
        mla = model.args.mla
        shape = (mla.kv_lora_rank, mla.qk_rope_head_dim)
        self.no_flash_mla = flash_mla_unavailable_reason(self.device, self.cache_dtype(), *shape)
        # FlashMLA's call is a graph break
        self.decode_block = torch.compile(_block, fullgraph=self.no_flash_mla is not None) if compile else _block
        for experts in experts_of(model):
            if experts.expert_down.device != self.device:
                experts.plan.operator = _experts_at_home

    def cache_dtype(self) -> torch.dtype:
        """The dtype of the model's latents."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.model.output.weight.dtype

    def new_cache(self, num_blocks: int) -> LatentCache:
        return LatentCache(self.model.args, num_blocks, self.device, self.cache_dtype())

    def report(self) -> str:
        """One line: which path computes attention in the decode step, and why it is not FlashMLA."""
        if self.no_flash_mla is None:
            return "decode attention: FlashMLA"
        how = "compiled" if self.compile else "not compiled"
        return f"decode attention: PyTorch, absorbed form, {how} ({self.no_flash_mla})"

    def bytes_read(self, num_sequences: int) -> int:
        """Bytes of weights that a decode step reads."""
        return self._bytes_per_step + num_sequences * self._bytes_per_token

    def whole(self, tokens: Tensor) -> Tensor:
        """Run whole sequences without a cache: int64 [B, S] -> [B, S, D], normed; padding belongs on the right."""
        rope = self.model.rope[None, : tokens.shape[1]]
        with self.precision():
            x = self.model.embed(tokens)
            for block in self.model.layers:
                x = block(x, rope, None, self.model.shared_experts)
            return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D], normed -> float32 [..., vocab]."""
        with self.precision():
            return self.model.output(hidden).float()

    def __call__(self, tokens: Tensor, step: CacheStep, cache: LatentCache, form: Form | None = None) -> Tensor:
        """Run new tokens, and write their latents into the cache.

        Args:
            tokens: int64 [B, S]; values beyond a sequence's new tokens are ignored.
            form: of attention; None: absorbed for one token per sequence, expanded for more.
        Returns:
            [B, S, D], normed, ready for the output head.
        """
        model = self.model
        form = form or ("absorbed" if tokens.shape[1] == 1 else "expanded")
        block_forward, schedule = _block, None
        if form == "absorbed":
            block_forward = self.decode_block
            # only for one new token per sequence: FlashMLA's causal mask assumes that the new tokens are last, without
            # padding
            if tokens.shape[1] == 1 and self.no_flash_mla is None and cache.dtype == torch.bfloat16:
                schedule = flash_mla_schedule(step.lengths, model.args.mla.n_heads)
        rope = model.rope[step.positions]  # [B, S, 2, qk_rope_head_dim / 2]
        with self.precision():
            x = model.embed(tokens)
            for block, pool in zip(model.layers, cache.layers):
                assert isinstance(block, Block)
                x = block_forward(block, x, rope, pool, step, form, schedule, model.shared_experts)
            return model.norm(x)


def _weights_read(model: Transformer) -> tuple[int, int]:
    """Bytes that a decode step reads whatever the batch, and those of the expert rows that each token chooses."""
    by_row: set[Tensor] = {*table_parameters(model)}
    if not model.args.tie_embeddings:
        by_row.add(model.tok_embeddings.weight)
    per_token = 0
    for _, peer in peer_layers(model):
        experts = peer.experts or model.shared_experts
        assert experts is not None
        row = sum(table[0].numel() * table.element_size() for table in experts.tables())
        per_token += peer.num_heads * peer.num_experts_per_tok * row
    return sum(p.numel() * p.element_size() for p in model.parameters() if p not in by_row), per_token


def _block(
    block: Block,
    x: Tensor,
    rope: Tensor,
    pool: Tensor,
    step: CacheStep,
    form: Form,
    schedule: FlashMLASchedule | None,
    shared_experts: Experts | None,
) -> Tensor:
    """`Block.forward` with cached attention: x [B, S, D] -> [B, S, D]."""
    x = x + _attention(block.attention, block.attention_norm(x), rope, pool, step, form, schedule)
    return block.after_attention(x, shared_experts)


def _attention(
    mla: MLA, x: Tensor, rope: Tensor, pool: Tensor, step: CacheStep, form: Form, schedule: FlashMLASchedule | None
) -> Tensor:
    """`MLA.forward` over the cached tokens and the new ones: x [B, S, D] -> [B, S, D]; writes the new latents."""
    q_nope, q_rope = mla.queries(x, rope)
    latent, k_rope = mla.latents(x, rope)
    entries = torch.cat([latent, k_rope.squeeze(2)], dim=-1)  # [B, S, kv_lora_rank + qk_rope_head_dim]
    pool.view(-1, pool.shape[-1])[step.slots] = entries.flatten(0, 1).to(pool.dtype)

    if form == "absorbed":
        q = mla.absorbed_queries(q_nope, q_rope)
        if schedule is not None:
            attended = flash_mla_attention(q, pool, step.block_table, step.lengths, schedule, mla.softmax_scale)
            return mla.absorbed_output(attended)
        cached = pool[step.block_table].flatten(1, 2).to(q.dtype)  # [B, L, kv_lora_rank + qk_rope_head_dim]
        return mla.absorbed_output(attend_to_latents(q, cached, step.mask, mla.softmax_scale, mla.kv_lora_rank))

    if step.mask is not None:
        cached = pool[step.block_table].flatten(1, 2).to(latent.dtype)
        latent, k_rope = cached[..., : mla.kv_lora_rank], cached[:, :, None, mla.kv_lora_rank :]
    k, v = mla.expand(latent, k_rope)
    q = torch.cat([q_nope, q_rope], dim=-1)
    out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), step.mask, mla.softmax_scale)
    return mla.wo(out.transpose(1, 2).flatten(2))


def _experts_at_home(
    x: Tensor, indices: Tensor, gates: Tensor, expert_down: Tensor, expert_up: Tensor, *options: Any
) -> Tensor:
    """`peer_experts` with tables on another device than the tokens: these go there and back, tables stay."""
    home = expert_down.device
    at_home = (x.to(home), indices.to(home), gates.to(home))
    return peer_experts(*at_home, expert_down, expert_up, *options).to(x.device)
