"""Everything that is applied to a model from outside, in one fixed order: expert parallelism, float8, activation
checkpointing, compilation, FSDP2. The model file knows nothing about processes.

Every process is a data-parallel one and has its own sequences. Dense parameters are sharded by FSDP2 (HSDP with a
replicate degree). Expert tables are never gathered: they are sharded over expert-parallel groups, and processes that
hold the same experts exchange gradients, either as factors whose size follows the tokens or as dense tables.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from titan_peer.common.errors import UserError
from titan_peer.common.host_memory import prefer_huge_pages
from titan_peer.config.job import JobConfig
from titan_peer.distributed.activation_checkpoint import apply_activation_checkpointing
from titan_peer.distributed.collectives import GatherBytes, all_gather, local
from titan_peer.distributed.expert_parallel import ExpertParallel
from titan_peer.distributed.float8 import apply_float8
from titan_peer.distributed.world import World
from titan_peer.model import QueryBatchNorm, Transformer, experts_of, table_parameters


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for training.mixed_precision_param on this device."""
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """A factory of contexts in which only matrix products are computed in `dtype`: see docs/distributed.md, Precision.

    Cast weights are not cached, since no weight is used twice and they would stay in memory until the context ends.
    """
    if dtype == torch.float32:
        return nullcontext
    return partial(torch.autocast, device.type, dtype=dtype, cache_enabled=False)


def matrices(module: nn.Module) -> set[Any]:
    """Weights that only matrix products read, in the compute dtype: those of linear layers, except a tied head. All
    others (gains, embeddings, sub-keys, expert tables) are read in their own dtype."""
    embeddings = {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}
    return {m.weight for m in module.modules() if isinstance(m, nn.Linear)} - embeddings


def apply_compile(model: Transformer) -> None:
    """Compile every block in place, without graph breaks, and the loss. Equal blocks share one compilation."""
    for block in model.layers:
        block.compile(fullgraph=True)
    model.compile_loss = True


def apply_expert_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    for experts in experts_of(model):
        parallelize_module(experts, mesh, ExpertParallel())


def apply_data_parallel(
    model: Transformer, world: World, param_dtype: torch.dtype, *, offload: bool, float8: bool = False
) -> None:
    """Shard the dense parameters with FSDP2, block by block, and make batch-norm statistics global.

    The matrices of blocks are gathered in the compute dtype, to which `autocast` would cast them anyway. Parameters
    that must not be rounded are gathered in float32, together with the head, once per step.

    Args:
        param_dtype: the compute dtype.
        float8: matrices may be gathered in float8.
        offload: keep the shards, their gradients and their moments in host memory.
    """
    mesh, group = world.mesh, world.dp_group
    assert mesh is not None and group is not None
    if mesh.size(0) == 1:
        mesh = mesh["dp_shard"]

    def gather(moments: Tensor) -> Tensor:
        return all_gather(moments[None], group)

    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.gather_from_replicas = gather
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    tables = table_parameters(model)
    of_blocks = matrices(model.layers)
    # The whole model comes first: it takes the parameters, in all modules, that the blocks are then told to ignore.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, reshard_after_forward=False, ignored_params=tables | of_blocks, mp_policy=policy, **options)
    others = set(model.parameters()) - of_blocks
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, ignored_params=others, mp_policy=policy, **options)
        if float8 and world.device.type == "cpu":
            block.set_custom_all_gather(GatherBytes())  # type: ignore[operator]
    for module in (model, *model.layers):
        # gradients are summed over processes, not averaged: see train_step.py
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


def forget_gathered(model: nn.Module) -> None:
    """Call when something other than a step has written the shards: FSDP gathers them again for the next forward pass.
    (What the whole model's own group has gathered for a forward pass without a backward pass would stay.)"""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parallelize(model: Transformer, config: JobConfig, world: World) -> None:
    """Apply the job's plans to a model that is still on the meta device.

    Raises:
        UserError: training.enable_cpu_offload with a single process, or float8 is not possible.
    """
    if world.expert_mesh is not None and world.ep_degree > 1:
        apply_expert_parallel(model, world.expert_mesh["ep"])
    if config.float8.enable:
        apply_float8(model, config.float8, sharded=world.mesh is not None)
    apply_activation_checkpointing(model, config.activation_checkpoint, compiled=config.compile.enable)
    if config.compile.enable:
        apply_compile(model)
    if world.mesh is not None:
        dtype = compute_dtype(config.training.mixed_precision_param, world.device)
        offload = config.training.enable_cpu_offload
        apply_data_parallel(model, world, dtype, offload=offload, float8=config.float8.enable)
    elif config.training.enable_cpu_offload:
        raise UserError("training.enable_cpu_offload = true: offloads what FSDP shards, which takes several processes")


def materialize(model: Transformer, device: torch.device, *, offload: bool) -> None:
    """Allocate the memory of a parallelized model on the meta device; `init_weights` or a checkpoint then fills it.

    Args:
        offload: dense parameters go to host memory, expert tables and buffers to `device`.
    """
    model.to_empty(device=torch.device("cpu") if offload else device)
    if offload:
        for experts in experts_of(model):
            experts.to_empty(device=device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for table in table_parameters(model):
        prefer_huge_pages(local(table))
