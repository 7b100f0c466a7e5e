"""Everything that processes exchange goes through the functions here, each of which does one thing.

`all_gather` and `reduce_scatter` work inside a compiled graph and have gradients (PyTorch 2.13 renamed what they call,
and warns about the old names). `all_gather_into`, `exchange_bytes`, `sum_over_processes` and `max_over_processes` work on tensors outside
of graphs, `on_all_processes` on Python objects: it also runs what may fail on one process only, so that the others do
not wait for that process in the next collective. Process groups are created inside `one_gloo_thread`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor, Shard

from titan_peer.common.errors import TransientError, UserError, is_transient

T = TypeVar("T")

_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_all_gather_autograd = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
_reduce_scatter_autograd = (
    getattr(functional, "reduce_scatter_single_autograd", None) or functional.reduce_scatter_tensor_autograd
)
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the `part` [T, ...] of all processes -> [group x T, ...]; the backward pass sums and scatters."""
    gather = _all_gather_autograd if part.requires_grad else _all_gather
    return gather(part.contiguous(), 0, group)  # type: ignore[no-any-return]


def reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the `whole` [group x T, ...] of all processes; each gets its part [T, ...]. The backward pass all-gathers."""
    return _reduce_scatter_autograd(whole.contiguous(), "sum", 0, group)  # type: ignore[no-any-return]


def sum_and_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`reduce_scatter` without gradients, inside or outside of compiled graphs."""
    return _reduce_scatter(whole.contiguous(), "sum", 0, group)  # type: ignore[no-any-return]


def all_gather_into(part: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`all_gather` without gradients, outside of compiled graphs."""
    whole = part.new_empty(dist.get_world_size(group) * part.shape[0], *part.shape[1:])
    _all_gather_into(whole, part.contiguous(), group=group)
    return whole


def exchange_bytes(to_each: Sequence[Tensor], from_each: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Send one 1-D tensor to each process of a group and get one from each, all of one dtype, which gloo need not know.

    Args:
        from_each: how many numbers come from each process.
    """
    size, dtype = to_each[0].element_size(), to_each[0].dtype
    received = to_each[0].new_empty(sum(from_each))
    dist.all_to_all_single(
        received.view(torch.uint8),
        torch.cat(list(to_each)).view(torch.uint8),
        [number * size for number in from_each],
        [tensor.numel() * size for tensor in to_each],
        group=group,
    )
    return list(received.view(dtype).split(list(from_each)))


def sum_over_processes(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `values` in place over the processes of a group (None: of all); a single process keeps its own."""
    if dist.is_initialized():
        dist.all_reduce(values, group=group)
    return values


def max_over_processes(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The elementwise maximum, otherwise as `sum_over_processes`."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, detached; the whole tensor where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The processes that hold a tensor together, each a part; None: each process holds it whole."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    return tensor.device_mesh.get_group(dims[0]) if dims else None


class ProcessesFailedError(Exception):
    """Something failed on some processes; raised on all of them. Where it failed here, the cause is chained."""

    is_transient = False
    """On all of them, by what may go well another time."""


class _Failure(NamedTuple):
    words: str
    kind: type[UserError | TransientError] | None
    is_transient: bool


def on_all_processes(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `action`, which may fail and must hold no collective, on every process; all get everyone's results.

    Call it on all processes. Results are pickled and sent to every process, so keep them small.

    Args:
        group: a group of all processes that communicates tensors on the CPU; None takes the default group.
    Returns:
        The results in the order of ranks; a single process gets a list with its own.
    Raises:
        UserError: on every process, when only UserErrors were raised; with all their messages.
        TransientError: on every process, when TransientErrors were raised, and at most UserErrors besides.
        ProcessesFailedError: on every process, when any other exception was raised; the message names ranks and causes.
    """
    mine: tuple[T | None, _Failure | None]
    cause: Exception | None = None
    try:
        mine = (action(), None)
    except Exception as error:
        cause = error
        words = str(error).strip() or type(error).__name__
        if not isinstance(error, UserError | TransientError | OSError | ProcessesFailedError):
            words = f"{type(error).__name__}: {words}" if str(error).strip() else words
        kinds = (kind for kind in (UserError, TransientError) if isinstance(error, kind))
        mine = (None, _Failure(words, next(kinds, None), is_transient(error)))
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    failures: dict[int, _Failure] = {rank: found for rank, (_, found) in enumerate(everyone) if found is not None}
    if failures:
        raise _together(failures) from cause
    return [result for result, _ in everyone]


def _together(failures: dict[int, _Failure]) -> Exception:
    """One exception for those of all ranks."""
    kinds = {failure.kind for failure in failures.values()}
    if None not in kinds:
        kind = TransientError if TransientError in kinds else UserError
        return kind("\n".join(dict.fromkeys(failure.words for failure in failures.values())))
    together = ProcessesFailedError("; ".join(f"rank {rank}: {failure.words}" for rank, failure in failures.items()))
    together.is_transient = all(failure.is_transient for failure in failures.values())
    return together


class GatherBytes:
    """An all-gather for FSDP2's `set_custom_all_gather` that sends numbers gloo does not support (float8) as bytes."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        whole, part = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return _all_gather_into(whole, part, group=group, async_op=async_op)  # type: ignore[no-any-return]


@contextmanager
def one_gloo_thread() -> Iterator[None]:
    """Gloo process groups that are created inside this context run their collectives one after another, in one thread.

    PyTorch gives them two threads, which write the name of the last collective to one std::string without a lock. When
    two collectives of a group end at the same time, as those of an expert-parallel layer do, the string's memory is
    freed twice and the process crashes later (seen with PyTorch 2.13).
    """
    original = dist.ProcessGroupGloo

    class OneThread(original):  # type: ignore[misc, valid-type]
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
            options = original._Options()  # type: ignore[attr-defined]
            interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [original.create_device(interface=name) for name in interfaces]
            options._devices = devices or [original.create_default_device()]
            options._timeout = timeout
            options._threads = 1
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OneThread  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = original  # type: ignore[misc]


def new_gloo_group(timeout: datetime.timedelta) -> dist.ProcessGroup:
    """A group of all processes on the CPU, separate from the groups that training uses."""
    with one_gloo_thread():
        return dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[no-any-return]
