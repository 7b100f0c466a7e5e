"""The processes of a job: which one this is, how the job is spread over them, and the groups they communicate in.

No other module reads the number of processes. Code that distributes sequences, or averages over them, uses the
data-parallel degree. It equals the number of processes as long as each process has its own sequences; context and
tensor parallelism would add their degrees here and make the data-parallel degree a divisor of `size`.

Dense parameters are sharded over `mesh`, the data-parallel processes. The expert tables are sharded over `expert_mesh`,
which has the same processes in another shape.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_peer.common.errors import UserError
from titan_peer.common.launched import launched_as
from titan_peer.config.job import Parallelism
from titan_peer.distributed.collectives import one_gloo_thread


@dataclass(frozen=True)
class World:
    """This process, the number of processes, and the meshes that they form."""

    rank: int
    size: int
    """The number of processes."""
    device: torch.device
    mesh: DeviceMesh | None
    """(dp_replicate, dp_shard); None for a single process."""
    expert_mesh: DeviceMesh | None
    """(expert_replica, ep): processes of a column hold the same experts, those of a row hold all experts together."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def dp_degree(self) -> int:
        """The number of processes that have their own sequences: today, all of them."""
        return self.mesh.size() if self.mesh is not None else 1

    @property
    def dp_rank(self) -> int:
        """The number of this process among those that have their own sequences."""
        return self.rank

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """The data-parallel processes; None for a single process."""
        return dist.group.WORLD if self.mesh is not None else None

    @property
    def ep_degree(self) -> int:
        """The number of processes that hold the expert tables together, each a part."""
        return self.expert_mesh.size(1) if self.expert_mesh is not None else 1


def joined_as() -> tuple[int, int]:
    """The rank of this process and the number of processes in the process group; (0, 1) where there is none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def init_world(parallelism: Parallelism, device: torch.device | None = None) -> World:
    """Join the process group that torchrun describes (NCCL on CUDA, gloo on CPU); a single process needs none.

    Args:
        device: None takes this process' GPU, or the CPU where there is none.
    Raises:
        UserError: the parallel degrees do not fit the number of processes.
    """
    # the fake processes of a dry run have joined already
    rank, size = joined_as() if dist.is_initialized() else launched_as()
    replicate, shard, expert = _degrees(parallelism, size)
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif device is None:
        device = torch.device("cpu")
    if size == 1:
        return World(rank, size, device, None, None)
    timeout = datetime.timedelta(seconds=parallelism.timeout_seconds)
    with one_gloo_thread():
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=_store(timeout), rank=rank, world_size=size, timeout=timeout)
        mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
        expert_shape = (size // expert, expert)
        expert_mesh = init_device_mesh(device.type, expert_shape, mesh_dim_names=("expert_replica", "ep"))
    return World(rank, size, device, mesh, expert_mesh)


def _degrees(parallelism: Parallelism, size: int) -> tuple[int, int, int]:
    """The replicate, shard and expert-parallel degrees for `size` processes."""
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    expert = parallelism.expert_parallel_degree
    if shard == -1:
        shard = max(size // replicate, 1)
    if replicate * shard != size:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard}: "
            f"must equal the number of processes, {size}"
        )
    if size % expert:
        raise UserError(f"parallelism.expert_parallel_degree = {expert}: must divide the number of processes, {size}")
    return replicate, shard, expert


def _store(timeout: datetime.timedelta) -> dist.Store:
    """The job's key-value store, with separate keys for every restart by torchrun.

    torchrun keeps one store over restarts; without the prefix, a process may connect to the address of a dead one.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
