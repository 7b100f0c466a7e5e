"""Configuration of a titan_peer model: multi-head latent attention and product-key expert retrieval."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class TitanPeerConfig(PretrainedConfig):  # type: ignore[misc]
    """The architecture's numbers, with the names of titan_peer's job files in `[model]`.

    Args:
        mla: of the attention: n_heads, q_lora_rank (0: direct queries), kv_lora_rank, qk_nope_head_dim,
            qk_rope_head_dim, v_head_dim, rope_theta and YaRN's rope_factor, original_seq_len, beta_fast, beta_slow,
            mscale, mscale_all_dim.
        peer: of the expert layers: num_experts, product_key_dim (one entry per axis), num_heads, num_experts_per_tok
            (per head), expert_hidden_size, query_dim, query_norm, norm_query, norm_keys, gates, activation,
            keys_per_head, share_experts.
        peer_layers: the blocks (from 0) with experts; the others have a dense SwiGLU.
        zero_init_outputs: initial weights that write into the residual stream are zero, if any are created.
        embedding_norm: embeddings are divided by their root mean square.
        table_dtype: how the expert tables are stored: "float" (as the other weights), "int8" or "float8_e4m3", with a
            float32 scale per row.
        initializer_range: standard deviation of initial weights, if any are created.
    """

    model_type = "titan_peer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "ffn_hidden_dim",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(
        self,
        vocab_size: int = 4096,
        dim: int = 256,
        n_layers: int = 4,
        peer_layers: list[int] | None = None,
        ffn_hidden_dim: int = 768,
        max_seq_len: int = 4096,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = False,
        zero_init_outputs: bool = False,
        embedding_norm: bool = False,
        mla: dict[str, Any] | None = None,
        peer: dict[str, Any] | None = None,
        table_dtype: str = "float",
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.dim, self.n_layers = vocab_size, dim, n_layers
        self.peer_layers, self.ffn_hidden_dim = list(peer_layers or []), ffn_hidden_dim
        self.max_seq_len, self.norm_eps, self.tie_embeddings = max_seq_len, norm_eps, tie_embeddings
        self.zero_init_outputs, self.embedding_norm = zero_init_outputs, embedding_norm
        self.mla, self.peer, self.table_dtype = dict(mla or {}), dict(peer or {}), table_dtype
        self.initializer_range, self.use_cache = initializer_range, use_cache
        kwargs.pop("tie_word_embeddings", None)  # another name of tie_embeddings
        super().__init__(**kwargs)
