"""Which parameters are optimized alike: the groups of [optimizer], each with a learning rate and decay of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from titan_peer.config.optimizer import GroupName
from titan_peer.config.optimizer import Optimizer as OptimizerConfig
from titan_peer.model import MLA, PEER, QueryBatchNorm, Transformer, table_parameters

M = TypeVar("M", bound=nn.Module)


NORMS = (nn.RMSNorm, nn.LayerNorm, QueryBatchNorm)
"""Their gains and biases are no matrices, whatever their shape."""


def group_of_each(model: Transformer) -> dict[Tensor, GroupName]:
    """The group of every parameter, in the model's order."""
    groups: dict[Tensor, GroupName] = {}
    for parameter in model.parameters():
        groups[parameter] = "matrices" if parameter.ndim >= 2 else "gains"
    groups |= {parameter: "gains" for norm in _all(model, NORMS) for parameter in norm.parameters()}
    groups |= {keys: "sub_keys" for peer in _all(model, PEER) for keys in peer.sub_keys}
    groups |= dict.fromkeys(table_parameters(model), "expert_tables")
    groups[model.output.weight] = "head"
    groups |= {embedding.weight: "embeddings" for embedding in _all(model, nn.Embedding)}
    return groups


def parameter_groups(model: Transformer, config: OptimizerConfig, *, with_tables: bool) -> list[dict[str, Any]]:
    """The groups that have parameters, for an optimizer of PyTorch's kind.

    Args:
        with_tables: expert tables have dense gradients and get a group; otherwise they are left out.
    Returns:
        Each with its `name`, `params`, `betas` and `weight_decay`; and for matrices, `parts`: in the order of `params`,
        what `matrix_parts` says.
    """
    parameters: dict[GroupName, list[Tensor]] = {}
    for parameter, name in group_of_each(model).items():
        if with_tables or name != "expert_tables":
            parameters.setdefault(name, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for name, params in parameters.items():
        own = config.group(name)
        betas = (own.beta1, own.beta2)
        groups.append({"name": name, "params": params, "betas": betas, "weight_decay": own.weight_decay})
        if name == "matrices":
            parts = matrix_parts(model)
            groups[-1]["parts"] = [parts.get(parameter) for parameter in params]
    return groups


Parts = tuple[int, tuple[int, ...]]
"""(dim, sizes): the matrices that a fused projection's weight consists of, side by side in one dim."""


def matrix_parts(model: nn.Module) -> dict[Tensor, Parts]:
    """The weights that are several matrices in one: the projections of MLA, and the query projection of PEER.

    A weight of `nn.Linear` is [out, in]: parts that write to different places are side by side in dim 0, parts that read
    from different places in dim 1.
    """
    parts: dict[Tensor, Parts] = {}
    for mla in _all(model, MLA):
        queries = mla.wq if mla.q_lora_rank == 0 else mla.wq_b
        parts[queries.weight] = 0, (mla.qk_nope_head_dim + mla.qk_rope_head_dim,) * mla.n_heads
        parts[mla.wkv_a.weight] = 0, (mla.kv_lora_rank, mla.qk_rope_head_dim)
        parts[mla.wkv_b.weight] = 0, (mla.qk_nope_head_dim, mla.v_head_dim) * mla.n_heads
        parts[mla.wo.weight] = 1, (mla.v_head_dim,) * mla.n_heads
    for peer in _all(model, PEER):
        parts[peer.wq.weight] = 0, (peer.query_dim,) * peer.num_heads
    return parts


def _all(model: nn.Module, kind: type[M] | tuple[type[M], ...]) -> Iterator[M]:
    return (module for module in model.modules() if isinstance(module, kind))
