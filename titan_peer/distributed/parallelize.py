"""Everything put on a model from outside, in one fixed order: expert parallel, float8, activation checkpointing,
compile, FSDP2. The model file knows nothing of processes.

All processes are data-parallel ones: each has its own sequences. Dense parameters are sharded by FSDP2 (HSDP with a
replicate degree). Expert tables are never gathered: they are sharded over expert-parallel groups, and the groups that
hold the same experts exchange gradients, as factors whose size follows the tokens or as dense tables.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from titan_peer.common.errors import UserError
from titan_peer.common.host_memory import prefer_huge_pages
from titan_peer.config.job import JobConfig, Parallelism
from titan_peer.distributed.activation_checkpoint import apply_activation_checkpointing
from titan_peer.distributed.collectives import GatherBytes, all_gather, one_gloo_thread
from titan_peer.distributed.expert_parallel import ExpertParallel
from titan_peer.distributed.float8 import apply_float8
from titan_peer.model import Experts, QueryBatchNorm, Transformer
from titan_peer.optim.optimizers import local


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """(dp_replicate, dp_shard); None for a single process."""
    expert_mesh: DeviceMesh | None
    """(expert_replica, ep): processes of a column hold the same experts, those of a row together hold all."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def expert_parallel_degree(self) -> int:
        return self.expert_mesh.size(1) if self.expert_mesh is not None else 1


def init_world(parallelism: Parallelism, device: torch.device | None = None) -> World:
    """Join the process group that torchrun describes (NCCL on CUDA, gloo on CPU); a single process needs none.

    Args:
        device: None takes this process' GPU, or the CPU where there is none.
    Raises:
        UserError: the parallel degrees do not fit the number of processes.
    """
    if dist.is_initialized():  # the fake processes of a dry run
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    expert = parallelism.expert_parallel_degree
    if shard == -1:
        shard = max(world_size // replicate, 1)
    if replicate * shard != world_size:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard}: "
            f"must equal the number of processes, {world_size}"
        )
    if world_size % expert:
        raise UserError(
            f"parallelism.expert_parallel_degree = {expert}: must divide the number of processes, {world_size}"
        )
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif device is None:
        device = torch.device("cpu")
    if world_size == 1:
        return World(rank, world_size, device, None, None)
    timeout = datetime.timedelta(seconds=parallelism.timeout_seconds)
    with one_gloo_thread():
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=_store(timeout), rank=rank, world_size=world_size, timeout=timeout)
        mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
        expert_shape = (world_size // expert, expert)
        expert_mesh = init_device_mesh(device.type, expert_shape, mesh_dim_names=("expert_replica", "ep"))
    return World(rank, world_size, device, mesh, expert_mesh)


def _store(timeout: datetime.timedelta) -> dist.Store:
    """The job's key-value store, with keys of its own for every restart by torchrun.

    torchrun keeps one store over restarts; without the prefix a process may connect to the address of a dead one.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls for training.mixed_precision_param on this device."""
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which matrices are multiplied in `dtype`, and nothing else is: see docs/distributed.md, Precision.

    Weights that are cast are not kept for a second use, which no weight has: they would stay until the context ends.
    """
    if dtype == torch.float32:
        return nullcontext
    return partial(torch.autocast, device.type, dtype=dtype, cache_enabled=False)


def matrices(module: nn.Module) -> set[Any]:
    """Weights that nothing but a matrix product reads, in the compute dtype: those of linear layers, but not a tied head.
    All others (gains, embeddings, sub-keys, expert tables) are read as they are."""
    embeddings = {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}
    return {m.weight for m in module.modules() if isinstance(m, nn.Linear)} - embeddings


def apply_compile(model: Transformer) -> None:
    """Compile every block in place, without graph breaks, and the loss. Equal blocks share one compilation."""
    for block in model.layers:
        block.compile(fullgraph=True)
    model.compile_loss = True


def apply_expert_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    for module in list(model.modules()):
        if isinstance(module, Experts):
            parallelize_module(module, mesh, ExpertParallel())


def apply_data_parallel(
    model: Transformer, world: World, param_dtype: torch.dtype, *, offload: bool, float8: bool = False
) -> None:
    """Shard the dense parameters with FSDP2, a block at a time; make batch-norm statistics global.

    Blocks' matrices are gathered in the compute dtype, in which the forward pass under `autocast` would cast them anyway. What
    must not be rounded is gathered in float32, together with the head, once a step.

    Args:
        param_dtype: the compute dtype.
        float8: matrices may be gathered in it.
        offload: keep the shards, their gradients and moments in the host's memory.
    """
    mesh, everyone = world.mesh, dist.group.WORLD
    assert mesh is not None and everyone is not None
    if mesh.size(0) == 1:
        mesh = mesh["dp_shard"]

    def gather(moments: Tensor) -> Tensor:
        return all_gather(moments[None], everyone)

    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.gather_from_replicas = gather
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    tables = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    of_blocks = matrices(model.layers)
    # The whole first: it takes the parameters in all modules that the blocks, then, are told to leave alone.
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


def parallelize(model: Transformer, config: JobConfig, world: World) -> None:
    """Put the job's plans on a model that is still on the meta device."""
    if world.expert_mesh is not None and world.expert_parallel_degree > 1:
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
    """Give a parallelized model on the meta device memory; `init_weights` or a checkpoint then fills it.

    Args:
        offload: dense parameters to the host's memory, expert tables and buffers to `device`.
    """
    model.to_empty(device=torch.device("cpu") if offload else device)
    for module in model.modules() if offload else []:
        if isinstance(module, Experts):
            module.to_empty(device=device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    for module in model.modules():
        if isinstance(module, Experts):
            prefer_huge_pages(local(module.expert_down))
            prefer_huge_pages(local(module.expert_up))
