"""The layers of a titan_peer model, in plain PyTorch: norms, rotary positions, attention, experts.

Shapes: B batch, S new tokens, L cached and new tokens, D model dim, H heads, T = B*S, K experts per token, E expert
hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_titan_peer import TitanPeerConfig

_GATHERED_ELEMENTS = 1 << 24  # the most elements of gathered expert rows at a time
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def never_rounded(x: Tensor) -> Any:
    """A context in which autocast does not lower the precision of matrix products on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What linear layers multiply `x` in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def residual_scale(config: Any) -> float:
    """The factor by which initial weights that write into the residual stream are scaled down."""
    return 0.0 if config.zero_init_outputs else float((2 * config.n_layers) ** -0.5)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, dim: int, eps: float | None) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope(mla: dict[str, Any], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, S, 1, qk_rope_head_dim / 2], of positions [B, S]."""
    dim, theta, factor = mla["qk_rope_head_dim"], mla["rope_theta"], mla["rope_factor"]
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = theta ** -(pair / dim)
    if factor > 1:

        def pair_that_turns(rotations: float) -> float:
            return dim * math.log(mla["original_seq_len"] / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_that_turns(mla["beta_fast"])), 0)
        high = min(math.ceil(pair_that_turns(mla["beta_slow"])), dim - 1)
        share = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
        frequencies = frequencies * (1 - share) + frequencies / factor * share
    scale = yarn_mscale(factor, mla["mscale"]) / yarn_mscale(factor, mla["mscale_all_dim"])
    angles = (positions.float()[..., None] * frequencies)[:, :, None]
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs of the last dim: x [B, S, H, qk_rope_head_dim]."""
    (cos, sin), (even, odd) = cos_sin, x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class MLA(nn.Module):
    """Multi-head latent attention: expanded for many new tokens, absorbed for one."""

    def __init__(self, config: TitanPeerConfig, layer: int) -> None:
        super().__init__()
        mla, dim = config.mla, config.dim
        self.layer, self.n_heads, self.q_lora_rank = layer, mla["n_heads"], mla["q_lora_rank"]
        self.nope, self.rope, self.v_head_dim = mla["qk_nope_head_dim"], mla["qk_rope_head_dim"], mla["v_head_dim"]
        self.kv_lora_rank, qk_head_dim = mla["kv_lora_rank"], self.nope + self.rope
        self.scale = qk_head_dim**-0.5 * yarn_mscale(mla["rope_factor"], mla["mscale_all_dim"]) ** 2
        if self.q_lora_rank == 0:
            self.wq = nn.Linear(dim, self.n_heads * qk_head_dim, bias=False)
        else:
            self.wq_a = nn.Linear(dim, self.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(self.q_lora_rank, config.norm_eps)
            self.wq_b = nn.Linear(self.q_lora_rank, self.n_heads * qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(dim, self.kv_lora_rank + self.rope, bias=False)
        self.kv_norm = RMSNorm(self.kv_lora_rank, config.norm_eps)
        self.wkv_b = nn.Linear(self.kv_lora_rank, self.n_heads * (self.nope + self.v_head_dim), bias=False)
        self.wo = nn.Linear(self.n_heads * self.v_head_dim, dim, bias=False)
        self.wo.init_scale = residual_scale(config)  # type: ignore[assignment]

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: Cache | None,
        cache_position: Tensor | None,
    ) -> Tensor:
        """x [B, S, D], mask [B or 1, 1, S, L] (bool, or added to the scores), cache_position [S] -> [B, S, D]."""
        q = self.wq(x) if self.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x)))
        q_nope, q_rope = q.unflatten(-1, (self.n_heads, -1)).split([self.nope, self.rope], dim=-1)
        q_rope = rotate(q_rope, cos_sin)
        latent, k_rope = self.wkv_a(x).split([self.kv_lora_rank, self.rope], dim=-1)
        latent, k_rope = self.kv_norm(latent)[:, None], rotate(k_rope.unsqueeze(2), cos_sin).transpose(1, 2)
        if cache is not None:
            # The cache's "keys" are the latents, its "values" the rotated key parts; it has one head.
            latent, k_rope = cache.update(latent, k_rope, self.layer, {"cache_position": cache_position})
            # a fixed-size cache returns its empty places too
            latent, k_rope = latent[:, :, : mask.shape[-1]], k_rope[:, :, : mask.shape[-1]]

        if x.shape[1] == 1 and self._weights_are_at_hand():
            w_uk, w_uv = self.wkv_b.weight.unflatten(0, (self.n_heads, -1)).split([self.nope, self.v_head_dim], dim=1)
            absorbed = torch.einsum("bshd,hdr->bhsr", q_nope, w_uk)
            scores = (absorbed @ latent.mT + q_rope.transpose(1, 2) @ k_rope.mT).float() * self.scale  # [B, H, 1, L]
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            out = torch.einsum("bhsr,hdr->bshd", scores.softmax(dim=-1).to(x.dtype) @ latent, w_uv)
        else:
            k_nope, v = (
                self.wkv_b(latent[:, 0])
                .unflatten(-1, (self.n_heads, -1))
                .transpose(1, 2)
                .split([self.nope, self.v_head_dim], dim=-1)
            )  # [B, H, L, qk_nope_head_dim] and [B, H, L, v_head_dim]
            k = torch.cat([k_nope, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)
            q = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).transpose(1, 2)
        return self.wo(out.flatten(2))

    def _weights_are_at_hand(self) -> bool:
        """Whether wkv_b is a plain linear layer: no adapter, no quantised or offloaded weights."""
        return type(self.wkv_b) is nn.Linear and not hasattr(self.wkv_b, "_hf_hook")


class QueryBatchNorm(nn.Module):
    """Batch norm over tokens without padding; it uses running statistics outside training and if its weights are
    frozen.

    If frozen, as under an adapter, the statistics must not change, because they would not be saved with the adapter.
    """

    running_mean: Tensor
    running_var: Tensor
    moments: tuple[Tensor, Tensor] | None = None  # of the last batch, until they enter the running statistics

    def __init__(self, num_heads: int, query_dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_heads, query_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, query_dim))
        self.register_buffer("running_mean", torch.zeros(num_heads, query_dim))
        self.register_buffer("running_var", torch.ones(num_heads, query_dim))

    def forward(self, queries: Tensor, is_token: Tensor | None) -> Tensor:
        """queries [T, H, query_dim], is_token bool [T] -> the same as queries; statistics in float32."""
        q, mean, var = queries.float(), self.running_mean.float(), self.running_var.float()
        if self.training and self.weight.requires_grad:
            if is_token is None:
                is_token = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
            present, tokens = is_token[:, None, None], is_token.sum().to(q.dtype)
            batch_mean = torch.where(present, q, 0).sum(0) / tokens.clamp_min(1)
            # centred: E[q^2] - mean^2 would cancel
            batch_var = torch.where(present, q - batch_mean, 0).square().sum(0) / tokens.clamp_min(1)
            # a batch of padding only leaves everything as it is
            mean, var = torch.where(tokens > 0, batch_mean, mean), torch.where(tokens > 0, batch_var, var)
            self.moments = mean.detach(), var.detach()
        return ((q - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias).type_as(queries)

    @torch.no_grad()
    def update_running_statistics(self) -> None:
        """Called once per forward pass of the model; gradient checkpointing runs blocks twice."""
        if self.moments is not None:
            for running, newest in zip((self.running_mean, self.running_var), self.moments):
                running.lerp_(newest.to(running.dtype), self.momentum)
            self.moments = None


class Experts(nn.Module):
    """The expert tables, [N, E, D]: floats, or one-byte codes with a scale per row."""

    expert_down: Tensor
    expert_up: Tensor

    def __init__(self, config: TitanPeerConfig) -> None:
        super().__init__()
        peer, self.table_dtype = config.peer, config.table_dtype
        self.activation = _ACTIVATIONS[peer["activation"]]
        shape = (peer["num_experts"], peer["expert_hidden_size"], config.dim)
        for name in ("expert_down", "expert_up"):
            if self.table_dtype == "float":
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            else:
                dtype = torch.int8 if self.table_dtype == "int8" else torch.uint8
                self.register_buffer(name, torch.zeros(shape, dtype=dtype))
                self.register_buffer(f"{name}_scale", torch.zeros(shape[:2]))

    def rows(self, name: str, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """A table's rows [..., E, D] for experts [...]."""
        rows = getattr(self, name)[indices]
        if self.table_dtype == "float":
            return rows.to(dtype)
        if self.table_dtype == "float8_e4m3":
            rows = rows.view(torch.float8_e4m3fn)
        return (rows.float() * getattr(self, f"{name}_scale")[indices].float()[..., None]).to(dtype)

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """x [T, D], indices and gates [T, K] -> sum_j gate_j * up_j^T act(down_j x), [T, D]."""
        size = max(1, _GATHERED_ELEMENTS // (indices.shape[1] * self.expert_down[0].numel()))
        out = []
        with never_rounded(x):
            for xs, index, gate in zip(x.split(size), indices.split(size), gates.split(size)):
                z = torch.einsum("td,tked->tke", xs.float(), self.rows("expert_down", index, torch.float32))
                hidden = self.activation(z) * gate[..., None].float()
                out.append(torch.einsum("tke,tked->td", hidden, self.rows("expert_up", index, torch.float32)))
            return torch.cat(out).to(x.dtype)


class PEER(nn.Module):
    """Product-key expert retrieval (arXiv 2407.04153, algorithm 1)."""

    def __init__(self, config: TitanPeerConfig) -> None:
        super().__init__()
        peer = self.peer = config.peer
        self.axis_dim = peer["query_dim"] // len(peer["product_key_dim"])
        self.wq = nn.Linear(config.dim, peer["num_heads"] * peer["query_dim"], bias=False)
        self.query_norm: nn.Module | None = None
        if peer["query_norm"] == "batch":
            self.query_norm = QueryBatchNorm(peer["num_heads"], peer["query_dim"])
        elif peer["query_norm"] == "rms":
            self.query_norm = RMSNorm(peer["query_dim"], None)
        key_sets = peer["num_heads"] if peer["keys_per_head"] else 1
        self.sub_keys = nn.ParameterList(
            nn.Parameter(torch.zeros(key_sets, n_keys, self.axis_dim)) for n_keys in peer["product_key_dim"]
        )
        self.experts = None if peer["share_experts"] else Experts(config)

    def retrieve(self, x: Tensor, is_token: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k best experts of each head: x [T, D], is_token bool [T] -> scores float32 and indices, [T, H, k]."""
        peer, k = self.peer, self.peer["num_experts_per_tok"]
        queries = self.wq(x).float().unflatten(-1, (peer["num_heads"], peer["query_dim"]))
        if isinstance(self.query_norm, QueryBatchNorm):
            queries = self.query_norm(queries, is_token)
        elif self.query_norm is not None:
            queries = self.query_norm(queries)
        scores = indices = torch.zeros(0)
        for axis, (part, keys) in enumerate(zip(queries.split(self.axis_dim, dim=-1), self.sub_keys)):
            if peer["norm_query"]:
                part = F.normalize(part, dim=-1)
            if peer["norm_keys"]:
                keys = F.normalize(keys.float(), dim=-1) * math.sqrt(self.axis_dim)
            with never_rounded(x):
                products = (part.transpose(0, 1) @ keys.float().mT).transpose(0, 1)  # [T, H, n]
            best = products.topk(min(k, keys.shape[1]), dim=-1)
            if axis == 0:
                scores, indices = best.values, best.indices
                continue
            # The k best sums over the axes so far and this one are among the k best so far x the k best of this one.
            sums = (scores[..., :, None] + best.values[..., None, :]).flatten(-2)
            places = (indices[..., :, None] * keys.shape[1] + best.indices[..., None, :]).flatten(-2)
            top = sums.topk(min(k, sums.shape[-1]), dim=-1)
            scores, indices = top.values, places.gather(-1, top.indices)
        return scores, indices

    def forward(self, x: Tensor, is_token: Tensor | None, shared_experts: Experts | None) -> Tensor:
        """x [B, S, D], is_token bool [B, S] -> [B, S, D]."""
        tokens = x.flatten(0, 1)
        scores, indices = self.retrieve(tokens, None if is_token is None else is_token.flatten())
        kinds = {"softmax": lambda s: s.softmax(dim=-1), "sigmoid": torch.sigmoid, "relu": F.relu}
        gates = F.dropout(kinds[self.peer["gates"]](scores), self.peer["dropout"], self.training)
        experts = self.experts if self.experts is not None else shared_experts
        assert experts is not None
        tokens = tokens.to(compute_dtype(tokens))
        return experts(tokens, indices.flatten(1), gates.flatten(1)).view(x.shape)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TitanPeerConfig) -> None:
        super().__init__()
        dim, hidden_dim = config.dim, config.ffn_hidden_dim
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2.init_scale = residual_scale(config)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
