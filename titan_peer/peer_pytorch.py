"""Reads a layer of lucidrains' package PEER-pytorch, so that a model trained with it can go on with ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from titan_peer.model_args import PEERArgs

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


def read_peer_pytorch(layer: nn.Module) -> tuple[PEERArgs, dict[str, Tensor]]:
    """The arguments and the state dict of the PEER layer with the same output.

    Args:
        layer: a `PEER_pytorch.PEER`, version 0.2.
    Raises:
        ValueError: the layer has a part that there is not here.
    """
    theirs: Any = layer
    activation = _activation(theirs.activation)
    if problems := list(_problems(theirs, activation)):
        raise ValueError("PEER.from_peer_pytorch: " + "\n".join(problems))
    assert activation is not None
    num_heads, n_keys, axes, axis_dim = theirs.keys.shape
    args = PEERArgs(
        num_experts=theirs.num_experts,
        product_key_dim=[n_keys] * axes,
        num_heads=num_heads,
        num_experts_per_tok=theirs.num_experts_per_head_topk,
        query_dim=axes * axis_dim,
        query_norm="none",
        gates="softmax" if isinstance(theirs.score_activation, nn.Softmax) else "relu",
        activation=activation,
        dropout=theirs.dropout.p,
    )
    queries = theirs.to_queries[0].weight.detach().unflatten(0, (axes, num_heads, axis_dim))
    weights = {"wq.weight": queries.transpose(0, 1).flatten(0, 2)}  # there axes are outside of heads, here inside
    weights |= {f"sub_keys.{axis}": keys for axis, keys in enumerate(theirs.keys.detach().unbind(2))}
    weights["experts.expert_down"] = theirs.weight_down_embed.weight.detach()[:, None]
    weights["experts.expert_up"] = theirs.weight_up_embed.weight.detach()[:, None]
    return args, weights


def _activation(module: nn.Module) -> Activation | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return "relu" if isinstance(module, nn.ReLU) else "silu" if isinstance(module, nn.SiLU) else None


def _problems(theirs: Any, activation: Activation | None) -> Iterator[str]:
    if theirs.separate_embed_per_head:
        yield "separate_embed_per_head = True: here all heads share the experts"
    if not isinstance(theirs.norm, nn.Identity):
        yield "pre_rmsnorm = True: there is no norm in the layer here; put one before it"
    if activation is None:
        yield f"activation = {type(theirs.activation).__name__}: must be GELU, ReLU or SiLU"
    if theirs.product_key_topk < theirs.num_experts_per_head_topk:
        yield (
            f"product_key_topk = {theirs.product_key_topk}: is fewer than the {theirs.num_experts_per_head_topk} experts "
            "per head, so the layer misses some of the best ones; retrieval here is exact"
        )
