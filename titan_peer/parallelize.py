"""Everything put on a model from outside, in one fixed order: float8, activation checkpointing, compile, FSDP2.

The model file knows nothing of processes. Data parallelism here: all dense parameters are sharded by FSDP2 (HSDP with a
replicate degree). Expert tables with row-wise updates are not gathered or reduced at all: every process holds them, and
processes exchange the factors of their gradients, whose size follows the tokens, not the experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from titan_peer.config import Float8, JobConfig, Parallelism
from titan_peer.errors import UserError
from titan_peer.model import Experts, QueryBatchNorm, Transformer
from titan_peer.ops import RowGradients


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """(dp_replicate, dp_shard); None for a single process."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def init_world(parallelism: Parallelism) -> World:
    """Join the process group that torchrun describes (NCCL on CUDA, gloo on CPU); a single process needs none.

    Raises:
        UserError: the parallel degrees do not multiply to the number of processes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if shard == -1:
        shard = max(world_size // replicate, 1)
    if replicate * shard != world_size:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard}: "
            f"must equal the number of processes, {world_size}"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size == 1:
        return World(rank, world_size, device, None)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return World(rank, world_size, device, mesh)


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls for training.mixed_precision_param on this device."""
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported else torch.float32


def apply_float8(model: Transformer, config: Float8) -> int:
    """Make the blocks' linear layers whose dims fit compute in float8; returns how many."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "float8.enable = true: needs torchao; install it with: pip install 'titan_peer[float8]'"
        ) from None
    import dataclasses

    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name(config.recipe), emulate=config.emulate)
    converted = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal converted
        ok = isinstance(module, nn.Linear) and all(size % 16 == 0 for size in module.weight.shape)
        converted += ok
        return ok

    for block in model.layers:
        convert_to_float8_training(block, config=recipe, module_filter_fn=fits)
    if converted == 0:
        raise UserError("float8.enable = true: no linear layer of the blocks has both dims a multiple of 16")
    return converted


def apply_activation_checkpointing(model: Transformer, mode: str, every_n_layers: int) -> None:
    for i, block in enumerate(model.layers):
        if mode == "full" or (mode == "selective" and i % every_n_layers == 0):
            model.layers[i] = checkpoint_wrapper(block, preserve_rng_state=True)


def apply_compile(model: Transformer) -> None:
    """Compile every block in place, without graph breaks, and the loss. Equal blocks share one compilation."""
    for block in model.layers:
        block.compile(fullgraph=True)
    model.compile_loss = True


def apply_data_parallel(model: Transformer, mesh: DeviceMesh, param_dtype: torch.dtype, rowwise: bool) -> None:
    """Shard parameters with FSDP2, a block at a time; make batch-norm statistics global."""
    group = mesh._flatten("dp").get_group() if mesh.ndim > 1 else mesh.get_group()

    def average(moments: Tensor) -> Tensor:
        return all_gather_tensor_autograd(moments[None], gather_dim=0, group=group).mean(0)

    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.average_over_replicas = average
    ignored: set[nn.Parameter] = set()
    if rowwise:
        ignored = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    # rope and router scores stay float32: inputs are not cast
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored, reshard_after_forward=False)


def parallelize(model: Transformer, config: JobConfig, world: World) -> None:
    """Put the job's plans on a model that is on its device with its initial weights."""
    if config.float8.enable:
        apply_float8(model, config.float8)
    checkpointing = config.activation_checkpoint
    apply_activation_checkpointing(model, checkpointing.mode, checkpointing.every_n_layers)
    if config.compile.enable:
        apply_compile(model)
    if world.mesh is not None:
        dtype = compute_dtype(config.training.mixed_precision_param, world.device)
        apply_data_parallel(model, world.mesh, dtype, rowwise=config.optimizer.expert_update == "rowwise")


def exchange_row_gradients(collectors: list[RowGradients]) -> None:
    """Give every process the row-gradient factors of all, so that all update their tables alike."""
    for collector in collectors:
        gathered = []
        for factor in collector.factors():
            parts = [torch.empty_like(factor) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, factor.contiguous())
            gathered.append(torch.cat(parts))
        collector.replace(*gathered)
