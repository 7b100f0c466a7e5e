"""The model: a pre-norm Transformer of multi-head latent attention (MLA) and product-key expert retrieval (PEER).

Notable choices:
- MLA as in DeepSeek-V2/V3: low-rank queries and keys/values, a rope part shared by all heads, YaRN for long contexts.
- PEER ("Mixture of a Million Experts", arXiv 2407.04153) in place of the feed-forward in chosen layers: product keys
  over any number of axes, tiny experts of any hidden size. Other layers have a dense SwiGLU.
- Documents packed into one sequence do not see each other: positions restart and attention stops at a border.
- Padding is left out of batch-norm statistics, retrieves no experts and has no label.
- No biases. RMSNorm before every part and before the head. Head and embedding tied or not.
- Nothing here knows of devices, meshes or precision: `parallelize.py` puts these on from outside. What can be set from
  outside is declared in the class that it concerns: `Experts.plan`, `PEER.attach`, `QueryBatchNorm`, `Transformer`.
  Parts that need more precision than matrix products choose it themselves: norms, rotary positions, router scores,
  gates.

Shapes: B batch, S sequence, T = B*S tokens, D model dim, H heads, k experts per head, K = H*k experts per token, N
experts, C product-key axes, E expert hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_peer.model_args import FeedForwardKind, MLAArgs, ModelArgs, PEERArgs
from titan_peer.ops import RowGradients, peer_experts, product_key_retrieve
from titan_peer.ops.attention import AttentionMask, causal_attention, causal_mask, document_positions
from titan_peer.ops.cross_entropy import linear_cross_entropy
from titan_peer.peer_pytorch import read_peer_pytorch

# --------------------------------------------------------------------------------------------------------------------
# Rotary positions


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(args: MLAArgs, device: torch.device | None = None) -> Tensor:
    """Angular frequency of each rotated pair, float32 [qk_rope_head_dim / 2], YaRN-interpolated if so configured."""
    dim = args.qk_rope_head_dim
    frequencies = args.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if args.rope_factor <= 1:
        return frequencies

    def pair_that_turns(rotations: float) -> float:
        turns = args.original_seq_len / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(args.rope_theta))

    low = max(math.floor(pair_that_turns(args.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(args.beta_slow)), dim - 1)
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
    interpolated_share = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - interpolated_share) + frequencies / args.rope_factor * interpolated_share


def rope_table(args: MLAArgs, max_seq_len: int, device: torch.device | None = None) -> Tensor:
    """Cosines and sines for every position, float32 [max_seq_len, 2, qk_rope_head_dim / 2]."""
    positions = torch.arange(max_seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(args, device))
    scale = yarn_mscale(args.rope_factor, args.mscale) / yarn_mscale(args.rope_factor, args.mscale_all_dim)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * scale


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs (0,1), (2,3), ... of the last dim.

    Args:
        x: [B, S, H, qk_rope_head_dim]
        rope: float32 [B or 1, S, 2, qk_rope_head_dim / 2], cosines and sines of each token's position.
    """
    cos, sin = rope[:, :, None, 0], rope[:, :, None, 1]  # [B, S, 1, pairs]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


# --------------------------------------------------------------------------------------------------------------------
# Parts of a block


def wide(x: Tensor) -> Tensor:
    """x in float32 (float64 is kept), for what the compute dtype would round too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain (arXiv 1910.07467), computed in float32 whatever the dtypes of input and gain."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


class MLA(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, eq. 9-19).

    `forward` is the expanded form: keys and values of every head are made from the latents. Decoding may instead let
    the heads attend to the latents themselves, with the up-projections absorbed into queries and output (section
    2.1.2).
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        mla, dim = args.mla, args.dim
        self.n_heads = mla.n_heads
        self.q_lora_rank, self.kv_lora_rank = mla.q_lora_rank, mla.kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = mla.qk_nope_head_dim, mla.qk_rope_head_dim
        self.v_head_dim = mla.v_head_dim
        self.softmax_scale = mla.qk_head_dim**-0.5 * yarn_mscale(mla.rope_factor, mla.mscale_all_dim) ** 2

        if mla.q_lora_rank == 0:
            self.wq = nn.Linear(dim, mla.n_heads * mla.qk_head_dim, bias=False)
        else:
            self.wq_a = nn.Linear(dim, mla.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(mla.q_lora_rank, eps=args.norm_eps)
            self.wq_b = nn.Linear(mla.q_lora_rank, mla.n_heads * mla.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(dim, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, eps=args.norm_eps)
        self.wkv_b = nn.Linear(mla.kv_lora_rank, mla.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim), bias=False)
        self.wo = nn.Linear(mla.n_heads * mla.v_head_dim, dim, bias=False)

    def queries(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """No-rope and rotated parts of the queries: [B, S, H, qk_nope_head_dim] and [B, S, H, qk_rope_head_dim]."""
        q = self.wq(x) if self.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.unflatten(-1, (self.n_heads, -1))
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rope(q_rope, rope)

    def latents(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """What decoding caches: normed latents [B, S, kv_lora_rank] and the rotated key part [B, S, 1,
        qk_rope_head_dim]."""
        latent, k_rope = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), apply_rope(k_rope.unsqueeze(2), rope)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """From the output of `latents`: keys [B, S, H, qk_head_dim] and values [B, S, H, v_head_dim] of every head."""
        kv = self.wkv_b(latent).unflatten(-1, (self.n_heads, -1))
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, -1, self.n_heads, -1)], dim=-1), v

    def absorbed_queries(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """From the output of `queries`, queries for latents: (q_nope W^UK, q_rope), [B, S, H, kv_lora_rank + rope
        dim]."""
        w_uk = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))[:, : self.qk_nope_head_dim]  # [H, nope, kv_lora_rank]
        return torch.cat([torch.einsum("bshd,hdr->bshr", q_nope, w_uk), q_rope], dim=-1)

    def absorbed_output(self, attended: Tensor) -> Tensor:
        """Softmax-weighted sums of latents [B, S, H, kv_lora_rank] -> [B, S, D] through W^UV and W^O."""
        w_uv = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))[:, self.qk_nope_head_dim :]  # [H, v, kv_lora_rank]
        return self.wo(torch.einsum("bshr,hdr->bshd", attended, w_uv).flatten(2))

    def forward(self, x: Tensor, rope: Tensor, mask: AttentionMask) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        q = torch.cat(self.queries(x, rope), dim=-1)  # [B, S, H, qk_head_dim]
        k, v = self.expand(*self.latents(x, rope))
        out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.softmax_scale)
        return self.wo(out.transpose(1, 2).flatten(2))

    def init_weights(self, std: float, residual_std: float) -> None:
        for name, module in self.named_children():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual_std if name == "wo" else std)


class QueryBatchNorm(nn.Module):
    """Batch norm of queries over all tokens, with running statistics for evaluation."""

    gather_from_replicas: Callable[[Tensor], Tensor] | None = None
    """Set from outside if a batch is spread over R processes: stacks a tensor of all of them (with gradients) to [R,
    ...], which makes the statistics those of the global micro-batch."""
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_heads: int, query_dim: int, eps: float = 1e-5, momentum: float = 0.1, **factory: Any
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(num_heads, query_dim, **factory))
        self.bias = nn.Parameter(torch.empty(num_heads, query_dim, **factory))
        self.register_buffer("running_mean", torch.empty(num_heads, query_dim, **factory))
        self.register_buffer("running_var", torch.empty(num_heads, query_dim, **factory))

    def forward(self, queries: Tensor, is_token: Tensor | None = None) -> Tensor:
        """queries [T, H, query_dim] -> the same shape and dtype.

        Args:
            is_token: bool [T], false for padding, which the statistics leave out. None: no padding.
        """
        if self.training:
            mean, var, count = self.statistics(queries, is_token)
            with torch.no_grad():
                momentum = self.momentum * (count > 0)  # nothing is learnt from padding alone
                for running, own in ((self.running_mean, mean), (self.running_var, var)):
                    running.lerp_(own.to(running.dtype), momentum.to(running.dtype))
        else:
            mean, var = self.running_mean, self.running_var
        return ((queries - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias).type_as(queries)

    def statistics(self, q: Tensor, is_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of the tokens of all replicas, [H, query_dim] each; 0, 0, 0 where there are
        none."""
        if is_token is None:
            is_token = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
        present, count = is_token[:, None, None], is_token.sum().to(q.dtype)
        own_mean = torch.where(present, q, 0).sum(0) / count.clamp_min(1)
        # centred: E[q^2] - mean^2 would cancel
        own_var = torch.where(present, q - own_mean, 0).square().sum(0) / count.clamp_min(1)
        own = torch.stack([own_mean, own_var, count.expand_as(own_mean)])
        moments = own[None] if self.gather_from_replicas is None else self.gather_from_replicas(own)
        means, variances, counts = moments.unbind(1)  # [R, H, query_dim]
        total = counts.sum(0)
        shares = counts / total.clamp_min(1)
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0), total

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)


EXPERT_TABLES = ("expert_down", "expert_up")
"""The parameters of `Experts`, in the order in which they are computed with."""


@dataclass
class ExpertPlan:
    """All that is set from outside on an `Experts` module. The defaults: one device, dense gradients."""

    operator: Callable[..., Tensor] | None = None
    """Called in place of `peer_experts`, with its arguments: for tables that are sharded over a group of processes
    (`distributed/expert_parallel.py`), or that are on another device than the tokens (`inference/decoder.py`)."""
    row_gradients: RowGradients | None = None
    """Where backward passes record the tables' gradients, as factors of the rows used, in place of dense gradients; set
    by the optimizer that reads them."""
    compute_copies: tuple[Tensor, Tensor] | None = None
    """The tables in a lower precision, [N, E, D] each, to compute with; the optimizer that made them keeps them up to
    date."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module (deepcopy, pickle) is not what the optimizer updates: it computes with its own tables and
        # gives them dense gradients, until it gets an optimizer of its own.
        return ExpertPlan, (self.operator,)


class Experts(nn.Module):
    """The tables of N tiny experts: expert n computes expert_up[n]^T act(expert_down[n] x).

    `plan` is set from outside.
    """

    def __init__(self, dim: int, args: PEERArgs, **factory: Any) -> None:
        super().__init__()
        self.activation = args.activation
        self.plan = ExpertPlan()
        shape = (args.num_experts, args.expert_hidden_size, dim)
        self.expert_down = nn.Parameter(torch.empty(shape, **factory))  # [N, E, D]
        self.expert_up = nn.Parameter(torch.empty(shape, **factory))  # [N, E, D]

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """x [T, D], indices and gates [T, K] -> sum of the chosen experts' outputs, weighted by gates, [T, D].

        A place of index -1 adds nothing, and its gate gets no gradient.
        """
        operator = self.plan.operator or peer_experts
        return operator(x, indices, gates, *self.tables(), self.activation, self.plan.row_gradients)

    def tables(self) -> tuple[Tensor, Tensor]:
        """The tables to compute with, [N, E, D] each."""
        return self.plan.compute_copies or (self.expert_down, self.expert_up)

    def init_weights(self, residual_scale: float) -> None:
        dim = self.expert_down.shape[-1]
        nn.init.normal_(self.expert_down, std=dim**-0.5)
        nn.init.normal_(self.expert_up, std=dim**-0.5 * residual_scale)


RouteStage = Literal["record", "count", "loss"]
RouteHook = Callable[["PEER", Tensor, Tensor], Tensor | None]
"""Called with the layer, indices int64 [T, H, k] (-1: no expert) and gates [T, H, k] of each batch. Returns None, or
the gates to go on with: the same values, for instance with a loss attached whose gradient the backward pass adds."""


class PEER(nn.Module):
    """Parameter-efficient expert retrieval (arXiv 2407.04153, algorithm 1).

    What looks at the routing from outside is attached as a hook, and can be detached. Hooks that record run first, then
    those that count, then those that add a loss, in whatever order they were attached.

    Args:
        dim: D, of input and output.
        args: every other number of the layer; or each by its name, as in `PEER(512, num_experts=2**20, num_heads=8)`,
            where `product_key_dim` is, unless given, two axes as equal as the number of experts allows.
        device, dtype: of the parameters. Weights get their initial values, except on the meta device.
    Raises:
        ValueError: the layer is impossible; with a line for each reason.
    """

    def __init__(
        self,
        dim: int,
        args: PEERArgs | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        args = args or PEERArgs.of(**settings)
        if problems := args.problems():
            raise ValueError("PEER: " + "\n".join(problems))
        self.num_heads, self.num_experts_per_tok = args.num_heads, args.num_experts_per_tok
        self.query_dim, self.norm_query, self.norm_keys = args.query_dim, args.norm_query, args.norm_keys
        self.gates, self.dropout = args.gates, args.dropout
        num_axes = len(args.product_key_dim)
        self.axis_dim = args.query_dim // num_axes

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.wq = nn.Linear(dim, args.num_heads * args.query_dim, bias=False, **factory)
        self.query_norm: QueryBatchNorm | RMSNorm | None = None
        if args.query_norm == "batch":
            self.query_norm = QueryBatchNorm(args.num_heads, args.query_dim, **factory)
        elif args.query_norm == "rms":
            self.query_norm = RMSNorm(args.query_dim, **factory)
        key_sets = args.num_heads if args.keys_per_head else 1
        self.sub_keys = nn.ParameterList(
            nn.Parameter(torch.empty(key_sets, n_keys, self.axis_dim, **factory)) for n_keys in args.product_key_dim
        )  # C x [H or 1, n_c, query_dim / C]
        self.experts = None if args.share_experts else Experts(dim, args, **factory)
        self.route_hooks: list[tuple[RouteStage, RouteHook]] = []
        if not self.wq.weight.is_meta:
            self.init_weights(std=dim**-0.5, residual_scale=1.0)

    @classmethod
    def from_peer_pytorch(cls, layer: nn.Module) -> PEER:
        """A layer of the package PEER-pytorch (0.2) as one with the same output, up to float32 rounding.

        Raises:
            ValueError: the layer has a part that there is not here.
        """
        args, weights = read_peer_pytorch(layer)
        tables = weights["experts.expert_down"]
        ours = cls(tables.shape[-1], args, device="meta", dtype=tables.dtype).to_empty(device=tables.device)
        ours.load_state_dict(weights)
        return ours.train(layer.training)

    def attach(self, stage: RouteStage, hook: RouteHook) -> None:
        """Call `hook` with the routing of every batch until it is detached. Hooks of one stage run in the order
        attached."""
        self.route_hooks = sorted(
            [*self.route_hooks, (stage, hook)], key=lambda entry: get_args(RouteStage).index(entry[0])
        )

    def detach(self, hook: RouteHook) -> None:
        """Undo `attach`.

        Raises:
            ValueError: the hook is not attached.
        """
        kept = [entry for entry in self.route_hooks if entry[1] != hook]
        if len(kept) == len(self.route_hooks):
            raise ValueError(f"{hook}: is not attached to this layer")
        self.route_hooks = kept

    def retrieve(self, x: Tensor, is_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts of each token: x [T, D] -> indices int64 [T, H, k] and their scores float32 [T, H, k].

        Everything that decides which experts are chosen is float32: norm, queries, sub-keys and scores.
        """
        queries = wide(self.wq(x)).unflatten(-1, (self.num_heads, self.query_dim))  # [T, H, query_dim]
        if isinstance(self.query_norm, QueryBatchNorm):
            queries = self.query_norm(queries, is_token)
        elif self.query_norm is not None:
            queries = self.query_norm(queries)
        if self.norm_query:
            queries = F.normalize(queries.unflatten(-1, (-1, self.axis_dim)), dim=-1).flatten(-2)
        sub_keys = list(self.sub_keys)
        if self.norm_keys:
            # sqrt(axis_dim) gives unit-length keys the length of freshly initialised ones
            sub_keys = [F.normalize(keys, dim=-1) * math.sqrt(self.axis_dim) for keys in sub_keys]
        scores, indices = product_key_retrieve(queries, sub_keys, self.num_experts_per_tok)
        return indices, scores

    def gate(self, scores: Tensor) -> Tensor:
        """Scores [T, H, k] -> gates of the same shape."""
        if self.gates == "softmax":
            gates = scores.softmax(dim=-1)
        elif self.gates == "sigmoid":
            gates = scores.sigmoid()
        else:
            gates = scores.relu()
        return F.dropout(gates, self.dropout, self.training)

    def route(self, x: Tensor, is_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts of each token and their gates: x [T, D] -> int64 [T, H, k], float32 [T, H, k].

        Args:
            is_token: bool [T], false for padding, whose experts are -1: none. Its gates mean nothing. None: no padding.
        """
        indices, scores = self.retrieve(x, is_token)
        if is_token is not None:
            indices = torch.where(is_token[:, None, None], indices, -1)
        gates = self.gate(scores)
        for _, hook in self.route_hooks:
            returned = hook(self, indices, gates)
            gates = gates if returned is None else returned
        return indices, gates

    def forward(self, x: Tensor, shared_experts: Experts | None = None, is_token: Tensor | None = None) -> Tensor:
        """x [..., D] -> [..., D]; is_token bool [...], false for padding, which gets zeros."""
        experts = self.experts if self.experts is not None else shared_experts
        assert experts is not None, "PEER with share_experts needs the shared tables"
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        indices, gates = self.route(tokens, None if is_token is None else is_token.flatten())
        compute_dtype = self.wq.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            compute_dtype = torch.get_autocast_dtype(x.device.type)
        out = experts(tokens.to(compute_dtype), indices.flatten(1), gates.flatten(1))
        return out.view(x.shape)

    def init_weights(self, std: float, residual_scale: float) -> None:
        nn.init.normal_(self.wq.weight, std=std)
        if self.query_norm is not None:
            self.query_norm.reset_parameters()
        for keys in self.sub_keys:
            # A normalised query has about unit entries: scores of an axis start with about unit variance.
            nn.init.normal_(keys, std=self.axis_dim**-0.5)
        if self.experts is not None:
            self.experts.init_weights(residual_scale)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor, shared_experts: Experts | None = None, is_token: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]. The other two are for kinds that share tables or must know the padding."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def init_weights(self, std: float, residual_scale: float) -> None:
        nn.init.normal_(self.w1.weight, std=std)
        nn.init.normal_(self.w3.weight, std=std)
        nn.init.normal_(self.w2.weight, std=std * residual_scale)


FEED_FORWARD_KINDS: dict[FeedForwardKind, Callable[[ModelArgs], nn.Module]] = {
    "feed_forward": lambda args: FeedForward(args.dim, args.ffn_hidden_dim),
    "peer": lambda args: PEER(args.dim, args.peer),
}
"""What a block can have after its attention. A kind has the `forward` and `init_weights` of `FeedForward`; its
parameters and FLOPs are counted in `analysis/model_size.py`, and `ModelArgs.feed_forward_kind` says which layers have
it."""


class Block(nn.Module):
    """x + MLA(norm(x)), then x + F(norm(x)) with F one of FEED_FORWARD_KINDS."""

    def __init__(self, layer: int, args: ModelArgs) -> None:
        super().__init__()
        self.kind = args.feed_forward_kind(layer)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = MLA(args)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.add_module(self.kind, FEED_FORWARD_KINDS[self.kind](args))

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: AttentionMask,
        shared_experts: Experts | None = None,
        is_token: Tensor | None = None,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]; is_token bool [B, S], false for padding (None: there is none)."""
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return self.after_attention(x, shared_experts, is_token)

    def after_attention(
        self, x: Tensor, shared_experts: Experts | None = None, is_token: Tensor | None = None
    ) -> Tensor:
        """The second half: x [B, S, D] -> [B, S, D]."""
        feed_forward = getattr(self, self.kind)
        return x + feed_forward(self.ffn_norm(x), shared_experts, is_token)

    def init_weights(self, std: float, residual_scale: float) -> None:
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        self.attention.init_weights(std, std * residual_scale)
        getattr(self, self.kind).init_weights(std, residual_scale)


# --------------------------------------------------------------------------------------------------------------------
# The model


class Transformer(nn.Module):
    """Decoder-only language model.

    Built on the meta device, then `to_empty` and `init_weights`, so that a sharded model never exists whole.
    """

    loss_chunk_size = 1024
    """Set from outside: tokens whose logits exist at a time when the loss is asked for."""
    compile_loss = False
    """Set from outside when the blocks are compiled (in place): compile the loss as well."""
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Set from outside if matrices are kept in a low precision: the context in which `forward` computes."""

    rope: Tensor

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.vocab_size > 0, "vocab_size must be known before the model is built"
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(layer, args) for layer in range(args.n_layers))
        shares_experts = args.peer.share_experts and args.has("peer")
        self.shared_experts = Experts(args.dim, args.peer) if shares_experts else None
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", rope_table(args.mla, args.max_seq_len), persistent=False)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss when labels are given.

        Args:
            tokens: int64 [B, S], S at most max_seq_len.
            document_ids: integer [B, S]; runs of equal ids are documents, which do not see each other; negative ids are
                padding; if no two are equal, attention skips it. None: each row is one document.
            labels: int64 [B, S], the next token of each place, -100 where there is none to learn.
        Returns:
            logits [B, S, vocab] in the compute dtype; or, with labels, the float32 sum of -log p(label) over learnt
            tokens, made without ever holding all logits.
        """
        with self.precision():
            return self.logits_or_loss(tokens, document_ids, labels)

    def logits_or_loss(self, tokens: Tensor, document_ids: Tensor | None, labels: Tensor | None) -> Tensor:
        """`forward`, in the precision that the caller has chosen."""
        batch_size, seq_len = tokens.shape
        mask = causal_mask(document_ids, batch_size, seq_len, tokens.device)
        # [B or 1, S, 2, qk_rope_head_dim / 2]
        rope = self.rope[None, :seq_len] if document_ids is None else self.rope[document_positions(document_ids)]
        is_token = None if document_ids is None else document_ids >= 0
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x, rope, mask, self.shared_experts, is_token)
        x = self.norm(x)
        if labels is None:
            return self.output(x)
        return linear_cross_entropy(
            x.flatten(0, 1),
            self.output.weight,
            labels.flatten(),
            chunk_size=self.loss_chunk_size,
            compiled=self.compile_loss,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, D], what the first block reads."""
        x = self.tok_embeddings(tokens)
        if self.args.embedding_norm:
            x = F.rms_norm(x.float(), x.shape[-1:], eps=self.args.norm_eps).type_as(x)
        return x

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill all parameters and buffers (after `to_empty`); std = init_std, L = n_layers.

        | tensor                                              | initial value                    |
        | --------------------------------------------------- | -------------------------------- |
        | token embedding, output head, projections           | normal(0, std)                   |
        | wo, w2 (they write into the residual stream)        | normal(0, std / sqrt(2 L))       |
        | expert_down                                         | normal(0, 1 / sqrt(D))           |
        | expert_up (writes into the residual stream)         | normal(0, 1 / sqrt(2 L D))       |
        | sub_keys                                            | normal(0, 1 / sqrt(query_dim/C)) |
        | norm gains; batch-norm bias, running mean; variance | 1; 0; 1                          |

        What writes into the residual stream is 0 instead with `zero_init_outputs`.
        """
        args = self.args
        residual_scale = 0.0 if args.zero_init_outputs else (2 * args.n_layers) ** -0.5
        self.rope.copy_(rope_table(args.mla, args.max_seq_len, self.rope.device))
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight  # `to_empty` has made two of the one
        nn.init.normal_(self.tok_embeddings.weight, std=args.init_std)
        if not args.tie_embeddings:
            nn.init.normal_(self.output.weight, std=args.init_std)
        for block in self.layers:  # may be wrapped, for instance to recompute its activations
            block.init_weights(args.init_std, residual_scale)  # type: ignore[operator]
        if self.shared_experts is not None:
            self.shared_experts.init_weights(residual_scale)
        self.norm.reset_parameters()


# --------------------------------------------------------------------------------------------------------------------
# Finding parts, whatever blocks are wrapped in


def experts_of(model: nn.Module) -> list[Experts]:
    """All expert tables of a model, each pair once, in the order of layers; shared ones last."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all expert tables."""
    return {table for experts in experts_of(model) for table in experts.parameters()}


def peer_layers(model: Transformer) -> Iterator[tuple[int, PEER]]:
    """The PEER modules, with the numbers of their blocks."""
    for layer, block in enumerate(model.layers):
        for module in block.modules():
            if isinstance(module, PEER):
                yield layer, module
