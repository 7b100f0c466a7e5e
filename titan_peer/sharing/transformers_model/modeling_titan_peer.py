"""A titan_peer model in plain PyTorch: multi-head latent attention (MLA, arXiv 2405.04434) and product-key retrieval of
tiny experts (PEER, arXiv 2407.04153).

This is the reference form, without kernels, which transformers can load anywhere. Parameter names are those of
titan_peer's own checkpoints. The cache holds latents: `kv_lora_rank + qk_rope_head_dim` numbers per token and layer.

Shapes: B batch, S new tokens, L cached and new tokens, D model dim, H heads, T = B*S, K experts per token, E expert
hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_titan_peer import TitanPeerConfig
from .layers_titan_peer import MLA, PEER, Experts, FeedForward, QueryBatchNorm, RMSNorm, residual_scale, rope

# What this version of transformers calls the cache in a model's output.
_CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


def causal_mask(cached: int, seq_len: int, is_token: Tensor | None, documents: Tensor | None, device: Any) -> Tensor:
    """The attention mask, bool [B or 1, 1, S, L]: each place sees the earlier tokens of its document and itself.

    Args:
        is_token: bool [B, L], False for padding.
        documents: [B, L], the number of each place's document; None: one document per row.
    """
    places = torch.arange(cached + seq_len, device=device)
    seen = (places <= places[cached:, None])[None]
    if is_token is not None:
        seen = seen & is_token[:, None, :]
    if documents is not None:
        seen = seen & (documents[:, cached:, None] == documents[:, None, :])
    itself = places == places[cached:, None]  # for padding places too, so that no row of the softmax is empty
    return (seen | itself)[:, None]


class Block(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + MLA(norm(x)), then x + PEER(norm(x)) or x + FeedForward(norm(x))."""

    def __init__(self, config: TitanPeerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = MLA(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.has_peer = layer in config.peer_layers
        if self.has_peer:
            self.peer = PEER(config)
        else:
            self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Tensor,
        is_token: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None,
        shared_experts: Experts | None,
    ) -> Tensor:
        """x [B, S, D], is_token bool [B, S]; the other arguments as for MLA -> [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), cos_sin, mask, cache, cache_position)
        h = self.ffn_norm(x)
        return x + (self.peer(h, is_token, shared_experts) if self.has_peer else self.feed_forward(h))


class TitanPeerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model."""

    config_class = TitanPeerConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # from the Trainer: num_items_in_batch
    _supports_sdpa = True
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}  # noqa: RUF012 - as transformers has it
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [  # noqa: RUF012 - statistics, and the scales of one-byte codes
        "running_mean",
        "running_var",
        "expert_down_scale",
        "expert_up_scale",
    ]

    def __init__(self, config: TitanPeerConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        shares = bool(config.peer_layers) and config.peer["share_experts"]
        self.shared_experts = Experts(config) if shares else None
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.output = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what is not loaded as titan_peer does; transformers protects what is loaded."""
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range * getattr(module, "init_scale", 1.0))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, QueryBatchNorm):
            for tensor, value in (
                (module.weight, 1),
                (module.bias, 0),
                (module.running_mean, 0),
                (module.running_var, 1),
            ):
                nn.init.constant_(tensor, value)
        elif isinstance(module, nn.ParameterList):  # sub-keys
            for keys in module:
                nn.init.normal_(keys, std=keys.shape[-1] ** -0.5)
        elif isinstance(module, Experts) and module.table_dtype == "float":
            std = self.config.dim**-0.5
            nn.init.normal_(module.expert_down, std=std)
            nn.init.normal_(module.expert_up, std=std * residual_scale(self.config))

    def _validate_generated_length(self, generation_config: Any, *args: Any) -> None:
        """Check the length before generation, which would otherwise fail in the middle."""
        super()._validate_generated_length(generation_config, *args)  # type: ignore[misc]
        if generation_config.max_length > self.config.max_seq_len:
            raise ValueError(
                f"prompt (with padding) and new tokens together may have {generation_config.max_length:,} tokens, but the "
                f"model's context ends at max_seq_len = {self.config.max_seq_len:,}; lower max_new_tokens or max_length, "
                "or shorten the prompt"
            )

    def _places(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The places of the new tokens x [B, S, D].

        Returns:
            positions [B or 1, S], mask [B or 1, 1, S, L], is_token bool [B, S] (None: all are tokens), cache_position
            [S].
        """
        cached, seq_len = (0 if cache is None else cache.get_seq_length()), x.shape[1]  # a tensor in static caches
        if cache_position is None:
            cache_position = torch.arange(seq_len, device=x.device) + cached
        if attention_mask is not None and attention_mask.ndim == 4:
            positions = cache_position[None] if position_ids is None else position_ids
            self._require_known_positions(positions, None)
            return positions, attention_mask, None, cache_position

        length = int(cached) + seq_len
        is_token = documents = None
        if attention_mask is not None:
            if attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask covers {attention_mask.shape[1]} tokens, but {int(cached)} are cached and {seq_len} new"
                )
            is_token = attention_mask[:, :length].bool()
        if position_ids is not None:
            positions = position_ids
            if is_token is None and length == seq_len > 1:
                documents = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(dim=1)
        elif is_token is not None:
            positions = (is_token.long().cumsum(dim=1) - 1).clamp_min(0)[:, -seq_len:]
        else:
            positions = cache_position[None]
        self._require_known_positions(positions, length if position_ids is None else None)
        mask = causal_mask(length - seq_len, seq_len, is_token, documents, x.device)
        return positions, mask, None if is_token is None else is_token[:, -seq_len:], cache_position

    def _require_known_positions(self, positions: Tensor, length: int | None) -> None:
        """Refuse tokens beyond the model's context; `length`, if known, is an upper bound of the positions."""
        limit = self.config.max_seq_len
        if (length is not None and length <= limit) or positions.numel() == 0 or torch.compiler.is_compiling():
            return  # compiled: reading a number back would break the graph; `generate` has checked before
        last = int(positions.max()) + 1
        if last > limit:
            raise ValueError(f"{last:,} tokens: the model's context ends at max_seq_len = {limit:,}")

    def _update_running_statistics(self) -> None:
        for module in self.modules() if self.training else ():
            if isinstance(module, QueryBatchNorm):
                module.update_running_statistics()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, S, vocab], and the mean loss if labels are given.

        Args:
            input_ids: [B, S], or instead inputs_embeds [B, S, D].
            attention_mask: [B, L], 0 for padding on either side; or [B, 1, S, L], bool or added to the scores.
            position_ids: [B or 1, S]. Without mask and cache, positions that restart begin a new document.
            past_key_values: the cache, which newer versions of transformers call `cache`.
            labels: [B, S], the tokens themselves, -100 for tokens that are not learnt; they are shifted here.
            num_items_in_batch: the divisor of the summed loss, instead of the number of labels here.
            others: `cache_position` [S], which transformers 5.0 passes; newer ones warn about a model that names it.
        Raises:
            TypeError: an unknown keyword.
            ValueError: the tokens exceed the model's context, or a requested output or combination is not supported.
        """
        cache_position = others.pop("cache_position", None)
        if others:
            raise TypeError(
                f"{type(self).__name__}.forward() got an unexpected keyword argument {next(iter(others))!r}"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one thing; give one of them")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions = True: attention is computed by a kernel that keeps no weights")
        cache = cache if cache is not None else past_key_values
        repeats_blocks = any(getattr(block, "gradient_checkpointing", False) for block in self.layers)
        checkpointing = self.training and repeats_blocks and torch.is_grad_enabled()
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if checkpointing and cache is not None:
            raise ValueError("gradient checkpointing repeats the blocks, which would fill the cache twice; give none")
        if cache is None and use_cache and not checkpointing:
            cache = DynamicCache()

        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_norm:
            x = F.rms_norm(x.float(), x.shape[-1:], eps=self.config.norm_eps).type_as(x)
        positions, mask, is_token, cache_position = self._places(x, attention_mask, position_ids, cache, cache_position)
        cos_sin = rope(self.config.mla, positions)
        hidden_states = [x]
        for block in self.layers:
            x = block(x, cos_sin, mask, is_token, cache, cache_position, self.shared_experts)
            hidden_states.append(x)
        hidden_states[-1] = x = self.norm(x)
        self._update_running_statistics()

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        logits = self.output(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: Any = {"hidden_states": tuple(hidden_states) if wants_states else None, _CACHE: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
