"""Work on whole matrices that FSDP has sharded: each is gathered to one process, its owner, and the result goes back.

Owners are chosen so that all processes have about the same number of elements. Under HSDP the replicas share the work
as well: a matrix is gathered within one replica only, and the others get the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_peer.distributed.collectives import all_gather_into, exchange_bytes, shard_group, sum_over_processes

Work = Callable[[Sequence[int], list[Tensor]], list[Tensor]]
"""From the indices of some of the matrices and these matrices to their results, of the same shapes and dtype."""


def on_owners(params: Sequence[Tensor], parts: list[Tensor], work: Work) -> list[Tensor]:
    """Apply `work` to whole matrices, of which each process has the rows that its shard of the parameter has.

    Args:
        params: [m, n] each: plain tensors, or DTensors of one mesh, (dp_shard) or (dp_replicate, dp_shard), sharded in
            dim 0.
        parts: shaped like the local parts of `params`, all of one dtype.
    Returns:
        This process's part of each result.
    """
    first = params[0]
    if not isinstance(first, DTensor):
        return work(range(len(params)), parts)
    mesh = first.device_mesh
    shards, replicas = mesh.size(mesh.ndim - 1), mesh.size(0) if mesh.ndim == 2 else 1
    owners = _owners(tuple(parameter.numel() for parameter in params), replicas * shards)
    replica = mesh.get_local_rank(0) if mesh.ndim == 2 else 0
    group = mesh.get_group(mesh.ndim - 1)
    rank = mesh.get_local_rank(mesh.ndim - 1)
    of_rank = [[i for i, owner in enumerate(owners) if owner == replica * shards + j] for j in range(shards)]

    # to the owners: for each of them, this process's rows of its matrices
    rows = [_rows_of_each(parameter.shape[0], shards) for parameter in params]
    widths = [parameter.shape[1] for parameter in params]
    received = exchange_bytes(
        [_flat([parts[i] for i in of_rank[j]], like=parts[0]) for j in range(shards)],
        [sum(rows[i][k] * widths[i] for i in of_rank[rank]) for k in range(shards)],
        group,
    )
    pieces = [
        part.split([rows[i][k] * widths[i] for i in of_rank[rank]]) for k, part in enumerate(received)
    ]  # [shard][matrix]
    whole = [torch.cat(of_one).view(-1, widths[i]) for i, of_one in zip(of_rank[rank], zip(*pieces))]

    # and back: for each process, its rows of this owner's matrices
    made = work(of_rank[rank], whole)
    split = [matrix.split(rows[i]) for i, matrix in zip(of_rank[rank], made)]
    returned = exchange_bytes(
        [_flat([of_one[k] for of_one in split], like=parts[0]) for k in range(shards)],
        [sum(parts[i].numel() for i in of_rank[j]) for j in range(shards)],
        group,
    )
    results: list[Tensor] = list(parts)
    _take(torch.cat(returned), [i for of_one in of_rank for i in of_one], parts, results)
    if replicas > 1:
        members = [[i for i, owner in enumerate(owners) if owner // shards == j] for j in range(replicas)]
        _share_with_replicas(results, parts, members, members[replica], mesh.get_group(0))
    return results


def _share_with_replicas(
    results: list[Tensor], parts: list[Tensor], members: list[list[int]], own: list[int], group: dist.ProcessGroup
) -> None:
    """Put the results of the other replicas' matrices in the places of this one's parts.

    Args:
        members: the matrices of each replica.
        own: of this one.
    """
    sizes = [sum(parts[i].numel() for i in of_one) for of_one in members]
    flat = _flat([results[i] for i in own], like=parts[0])
    padded = torch.nn.functional.pad(flat, (0, max(sizes) - flat.numel()))
    everyone = all_gather_into(padded.view(torch.uint8), group).view(flat.dtype).view(len(members), -1)
    for of_one, size, theirs in zip(members, sizes, everyone):
        _take(theirs[:size], of_one, parts, results)


def _take(flat: Tensor, indices: list[int], parts: list[Tensor], results: list[Tensor]) -> None:
    """Cut `flat` into pieces shaped like the parts with these indices, and put these in their places."""
    for i, piece in zip(indices, flat.split([parts[i].numel() for i in indices])):
        results[i] = piece.view(parts[i].shape)


def _flat(tensors: list[Tensor], *, like: Tensor) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]) if tensors else like.new_empty(0)


def _rows_of_each(number: int, shards: int) -> list[int]:
    """How many of `number` rows each shard has (as `torch.chunk` and DTensor divide them)."""
    most = -(-number // shards)
    return [max(min(number - shard * most, most), 0) for shard in range(shards)]


@lru_cache(maxsize=8)
def _owners(sizes: tuple[int, ...], number: int) -> list[int]:
    """The owner of each matrix: the largest ones first, each to the process that has the least so far."""
    loads, owners = [0] * number, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[i] = min(range(number), key=lambda owner: loads[owner])
        loads[owners[i]] += sizes[i]
    return owners


def sum_over_shards(parameter: Tensor, values: Tensor) -> Tensor:
    """Sum `values` in place over the processes that hold the shards of a parameter, if it is sharded."""
    group = shard_group(parameter)
    return values if group is None else sum_over_processes(values, group)
