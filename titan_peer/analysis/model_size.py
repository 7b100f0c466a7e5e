"""What a model consists of: parameters, active parameters and FLOPs per token, by layer and component.

They are counted from the modules themselves, so that nothing is missed; this works on the meta device, for any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from titan_peer.model import MLA, PEER, Experts, FeedForward, Transformer

COMPONENTS = ("embedding", "attention", "feed-forward", "retrieval", "experts", "norms", "output head")


@dataclass(frozen=True)
class ComponentSize:
    """One component of one layer; all numbers except `total_parameters` are per token."""

    layer: int | None
    """The block, from 0; None for what is outside of blocks."""
    component: str
    """One of COMPONENTS. Retrieval: PEER's query projection, query norm and sub-keys."""
    total_parameters: int
    active_parameters: int
    """Parameters that take part in one token's forward pass: chosen experts only, one embedding row, the whole head.
    Tables shared by several layers are active once in each of them."""
    forward_flops: int
    """Floating-point operations (2 per multiply-add) of the matrix products only."""
    backward_flops: int
    """The same of the backward pass, without recomputation (attention inside its kernel, activation checkpointing)."""


@dataclass(frozen=True)
class ModelSize:
    """Counts that describe a model, per token of a sequence of a given length."""

    components: tuple[ComponentSize, ...]

    @property
    def total_parameters(self) -> int:
        return sum(part.total_parameters for part in self.components)

    @property
    def active_parameters(self) -> int:
        return sum(part.active_parameters for part in self.components)

    @property
    def forward_flops(self) -> int:
        """The forward pass, with attention counted over the whole sequence."""
        return sum(part.forward_flops for part in self.components)

    @property
    def training_flops(self) -> int:
        """Forward and backward: three times the forward pass, except for retrieval, whose backward touches only chosen
        keys."""
        return sum(part.forward_flops + part.backward_flops for part in self.components)


def model_size(model: Transformer, seq_len: int) -> ModelSize:
    """Parameters and FLOPs per token in sequences of `seq_len` tokens."""
    return ModelSize(tuple(_outside_of_blocks(model)) + tuple(_of_blocks(model, seq_len)))


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _linear(weights: int) -> dict[str, int]:
    """FLOPs of matrix products with this many weights: one product forward, two backward."""
    return {"forward_flops": 2 * weights, "backward_flops": 4 * weights}


def _outside_of_blocks(model: Transformer) -> Iterator[ComponentSize]:
    args = model.args
    head = model.output.weight.numel()
    if args.tie_embeddings:  # counted as the head, which is used whole
        yield ComponentSize(None, "embedding", 0, 0, 0, 0)
    else:
        yield ComponentSize(None, "embedding", model.tok_embeddings.weight.numel(), args.dim, 0, 0)
    if model.shared_experts is not None:
        yield ComponentSize(None, "experts", _count(model.shared_experts.parameters()), 0, 0, 0)
    gains = _count(model.norm.parameters())
    yield ComponentSize(None, "norms", gains, gains, 0, 0)
    yield ComponentSize(None, "output head", head, head, **_linear(head))


def _of_blocks(model: Transformer, seq_len: int) -> Iterator[ComponentSize]:
    for layer, block in enumerate(model.layers):
        for name, module in block.named_children():
            if isinstance(module, MLA):
                yield _attention(layer, module, seq_len)
            elif type(module) in _FEED_FORWARDS:
                yield from _FEED_FORWARDS[type(module)](layer, module, model)
            else:
                assert name.endswith("norm"), f"no rule to count {type(module).__name__}"
                gains = _count(module.parameters())
                yield ComponentSize(layer, "norms", gains, gains, 0, 0)


def _attention(layer: int, mla: MLA, seq_len: int) -> ComponentSize:
    parameters = _count(mla.parameters())
    weights = _count([m.weight for m in mla.modules() if isinstance(m, nn.Linear)])
    # scores and their product with the values: each like a matrix with S columns per head
    pairs = mla.n_heads * seq_len * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
    return ComponentSize(layer, "attention", parameters, parameters, **_linear(weights + pairs))


def _feed_forward(layer: int, module: FeedForward, model: Transformer) -> Iterator[ComponentSize]:
    weights = _count(module.parameters())
    yield ComponentSize(layer, "feed-forward", weights, weights, **_linear(weights))


def _peer(layer: int, module: PEER, model: Transformer) -> Iterator[ComponentSize]:
    yield _retrieval(layer, module)
    yield _experts(layer, module, module.experts or model.shared_experts)


_FEED_FORWARDS: dict[type[nn.Module], Callable[[int, Any, Transformer], Iterator[ComponentSize]]] = {
    FeedForward: _feed_forward,
    PEER: _peer,
}
"""How each of `titan_peer.model.FEED_FORWARD_KINDS` is counted: block, module and model -> components."""


def _retrieval(layer: int, peer: PEER) -> ComponentSize:
    parameters = _count(p for name, p in peer.named_parameters() if not name.startswith("experts."))
    projection = _linear(peer.wq.weight.numel())
    scores = 2 * sum(peer.num_heads * keys.shape[1] * keys.shape[2] for keys in peer.sub_keys)
    chosen_keys = 2 * peer.num_heads * peer.num_experts_per_tok * peer.query_dim
    return ComponentSize(
        layer,
        "retrieval",
        parameters,
        parameters,
        forward_flops=projection["forward_flops"] + scores,
        backward_flops=projection["backward_flops"] + 2 * chosen_keys,
    )


def _experts(layer: int, peer: PEER, experts: Experts | None) -> ComponentSize:
    assert experts is not None
    tables = list(experts.parameters())
    num_experts = tables[0].shape[0]
    chosen = peer.num_heads * peer.num_experts_per_tok * _count(tables) // num_experts
    total = _count(tables) if peer.experts is not None else 0  # shared tables are counted outside
    return ComponentSize(layer, "experts", total, chosen, **_linear(chosen))
