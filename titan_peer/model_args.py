"""Every number of the architecture, with its bounds. Without torch, so that a job can be read and checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from titan_peer.common.bounds import Range, out_of_range

MOST_LAYERS = 100_000  # checks go through them one by one
FeedForwardKind = Literal["feed_forward", "peer"]
"""What a block can have after its attention: a dense SwiGLU or PEER. The kind is also the name of that part in the
block and in checkpoints; `titan_peer.model.FEED_FORWARD_KINDS` builds it."""


@dataclass
class MLAArgs:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    n_heads: Annotated[int, Range(1)] = 8
    """Attention heads."""
    q_lora_rank: Annotated[int, Range(0)] = 0
    """Rank of the query compression; 0 projects queries directly from the model dim."""
    kv_lora_rank: Annotated[int, Range(1)] = 128
    """Rank of the joint key/value compression; this many numbers per token and layer are cached in decoding."""
    qk_nope_head_dim: Annotated[int, Range(1)] = 32
    """Dim per head of the part of queries and keys without rotary positions."""
    qk_rope_head_dim: Annotated[int, Range(1)] = 16
    """Dim per head of the part of queries and keys with rotary positions (one such part for the keys of all heads);
    even."""
    v_head_dim: Annotated[int, Range(1)] = 32
    """Dim per head of the values."""
    rope_theta: Annotated[float, Range(1, above=True)] = 10000.0
    """Base of the rotary frequencies."""
    rope_factor: Annotated[float, Range(1)] = 1.0
    """YaRN: context extension factor; 1.0 leaves rotary positions unscaled."""
    original_seq_len: Annotated[int, Range(1)] = 4096
    """YaRN: context length of the model before extension."""
    beta_fast: Annotated[float, Range(0, above=True)] = 32.0
    """YaRN: dims that turn more often than this over the original context are not interpolated."""
    beta_slow: Annotated[float, Range(0, above=True)] = 1.0
    """YaRN: dims that turn less often than this over the original context are fully interpolated."""
    mscale: Annotated[float, Range(0)] = 1.0
    """YaRN: attention temperature factor put on the rotated parts."""
    mscale_all_dim: Annotated[float, Range(0)] = 1.0
    """YaRN: attention temperature factor put on the whole softmax scale (DeepSeek-V3 sets both to 1)."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass
class PEERArgs:
    """Product-key expert retrieval (arXiv 2407.04153, section 2)."""

    num_experts: Annotated[int, Range(1)] = 16384
    """Experts per layer, N."""
    product_key_dim: list[Annotated[int, Range(1)]] = field(default_factory=lambda: [128, 128])
    """Sub-keys of each product-key axis; any number of axes of any sizes whose product is num_experts."""
    num_heads: Annotated[int, Range(1)] = 4
    """Retrieval heads, H; each has its own queries."""
    num_experts_per_tok: Annotated[int, Range(1)] = 8
    """Experts that each head retrieves per token, k."""
    expert_hidden_size: Annotated[int, Range(1)] = 1
    """Hidden neurons per expert, E (the paper uses single-neuron experts)."""
    query_dim: Annotated[int, Range(1)] = 128
    """Dim of the query of each head; split evenly over the axes."""
    query_norm: Literal["batch", "rms", "none"] = "batch"
    """Normalisation of queries before retrieval (the paper uses batch norm, which spreads usage)."""
    norm_query: bool = False
    """Scale every query's axis part to unit length."""
    norm_keys: bool = False
    """Scale every sub-key to unit length (with norm_query: cosine scores)."""
    gates: Literal["softmax", "sigmoid", "relu"] = "softmax"
    """How the k scores of a head become gates; softmax is over the k retrieved experts."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    """Activation of an expert's hidden neurons."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability of dropping a retrieved expert in training."""
    keys_per_head: bool = True
    """Each head has its own sub-keys; false shares one set."""
    share_experts: bool = False
    """All PEER layers use one pair of expert tables (each keeps its own queries and sub-keys)."""

    @classmethod
    def of(cls, **settings: Any) -> PEERArgs:
        """These settings; without `product_key_dim`, two axes as equal as the number of experts allows."""
        args = cls(**settings)
        if "product_key_dim" not in settings:
            args.product_key_dim = squarest(args.num_experts) if args.num_experts >= 1 else []
        return args

    def problems(self, prefix: str = "") -> list[str]:
        """What makes this layer impossible: one line per problem, naming key, value and what is allowed.

        Args:
            prefix: is put before the keys.
        """
        if found := list(out_of_range(self, prefix)):
            return found
        axes = self.product_key_dim

        def require(ok: bool, key: str, allowed: str) -> None:
            if not ok:
                found.append(f"{prefix}{key} = {getattr(self, key)}: {allowed}")

        require(bool(axes), "product_key_dim", "at least one axis is needed")
        require(
            math.prod(axes) == self.num_experts,
            "product_key_dim",
            f"its product {math.prod(axes):,} must equal {prefix}num_experts = {self.num_experts:,}",
        )
        require(
            self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            f"must be at most {prefix}num_experts = {self.num_experts:,}",
        )
        require(
            bool(axes) and self.query_dim % len(axes) == 0,
            "query_dim",
            f"must be a multiple of the number of axes of {prefix}product_key_dim, {len(axes)}",
        )
        return found


def squarest(number: int, axes: int = 2) -> list[int]:
    """Sizes of product-key axes, as equal as the divisors of `number` allow, the larger ones first."""
    sizes: list[int] = []
    left = number
    for axis in range(axes, 1, -1):
        ideal = left ** (1 / axis)
        small = [d for d in range(1, math.isqrt(left) + 1) if left % d == 0]
        sizes.append(min([*small, *(left // d for d in small)], key=lambda d: abs(math.log(d / ideal))))
        left //= sizes[-1]
    return sorted([*sizes, left], reverse=True)


@dataclass
class ModelArgs:
    """Every number of the architecture."""

    vocab_size: Annotated[int, Range(0)] = 0
    """Entries of the vocabulary; 0 takes the tokenizer's."""
    dim: Annotated[int, Range(1)] = 256
    """Model dim, D."""
    n_layers: Annotated[int, Range(1, MOST_LAYERS)] = 4
    """Number of blocks."""
    n_dense_layers: Annotated[int, Range(0)] = 1
    """The first blocks, which have a dense feed-forward instead of PEER."""
    peer_every_n_layers: Annotated[int, Range(0)] = 1
    """After the dense blocks, every n-th block has PEER, the first of them included; 0 means none."""
    peer_layers: list[Annotated[int, Range(0)]] = field(default_factory=list)
    """Which blocks (from 0) have PEER; when given, n_dense_layers and peer_every_n_layers are not used."""
    ffn_hidden_dim: Annotated[int, Range(1)] = 768
    """Hidden dim of the dense SwiGLU feed-forward."""
    max_seq_len: Annotated[int, Range(1)] = 4096
    """Longest sequence for which rotary positions are prepared."""
    norm_eps: Annotated[float, Range(0, above=True)] = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output head."""
    init_std: Annotated[float, Range(0, above=True)] = 0.02
    """Standard deviation of the initial weights of projections and embeddings."""
    zero_init_outputs: bool = False
    """Weights that write into the residual stream (wo, w2, expert_up) are zero at first: every block begins as the
    identity, and the model as one of token pairs."""
    embedding_norm: bool = False
    """Divide each token's embedding by its root mean square, so that the residual stream begins with unit entries."""
    mla: MLAArgs = field(default_factory=MLAArgs)
    """Attention."""
    peer: PEERArgs = field(default_factory=PEERArgs)
    """Experts."""

    def feed_forward_kind(self, layer: int) -> FeedForwardKind:
        """What block `layer` (from 0) has after its attention. The only place that decides it."""
        if self.peer_layers:
            return "peer" if layer in self.peer_layers else "feed_forward"
        after_dense = layer - self.n_dense_layers
        has_peer = self.peer_every_n_layers > 0 and after_dense >= 0 and after_dense % self.peer_every_n_layers == 0
        return "peer" if has_peer else "feed_forward"

    def has(self, kind: FeedForwardKind) -> bool:
        """Whether any block has this kind of feed-forward. Quick also for a number of layers that is out of range."""
        return any(self.feed_forward_kind(layer) == kind for layer in range(min(self.n_layers, MOST_LAYERS)))

    def layers_of(self, kind: FeedForwardKind) -> list[int]:
        """The blocks (from 0) with this kind of feed-forward."""
        return [layer for layer in range(self.n_layers) if self.feed_forward_kind(layer) == kind]

    def problems(self) -> list[str]:
        """What makes this architecture impossible: one line per problem, naming key, value and what is allowed."""
        found = list(out_of_range(self, "model."))

        def require(ok: bool, key: str, value: object, allowed: str) -> None:
            if not ok:
                found.append(f"model.{key} = {value}: {allowed}")

        mla, peer = self.mla, self.peer
        outside = [layer for layer in self.peer_layers if layer >= self.n_layers]
        require(not outside, "peer_layers", self.peer_layers, f"entries must be from 0 to {self.n_layers - 1}")
        require(mla.qk_rope_head_dim % 2 == 0, "mla.qk_rope_head_dim", mla.qk_rope_head_dim, "must be even")
        require(
            mla.beta_slow <= mla.beta_fast,
            "mla.beta_slow",
            mla.beta_slow,
            f"must be at most model.mla.beta_fast = {mla.beta_fast}",
        )
        if self.has("peer"):
            found += [problem for problem in peer.problems("model.peer.") if problem not in found]
        return found
