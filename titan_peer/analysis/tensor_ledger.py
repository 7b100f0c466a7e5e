"""Records, while tensor code runs, which memory is alive and for what, and what is sent over which process group.

Meant for fake tensors: a training step of any size then runs in seconds on any machine, and the record shows what the
real step would take.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# the operation of a collective, by a part of its operator's name
_COLLECTIVES = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Collective:
    """One kind of communication over one process group."""

    operation: str
    group_name: str
    group_size: int


@dataclass
class Traffic:
    """One process' use of a collective."""

    calls: int = 0
    payload_bytes: int = 0
    """Size of the whole tensors: after gathering, or before reducing."""
    sent_bytes: int = 0
    """Bytes that this process sends in a ring of n: (n - 1) / n of the payload, twice that for an all-reduce."""


@dataclass
class _Storage:
    reference: weakref.ref[torch.UntypedStorage]
    size: int
    kind: str


class TensorLedger(TorchDispatchMode):
    """Context manager. Memory that is allocated inside is recorded under the `kind` set at that time.

    Args:
        read_number: gives the value of a number that the program reads from a tensor, since fake tensors have no
            values.
    """

    supports_higher_order_operators = True  # compiled graphs contain some, for instance around random numbers

    def __init__(self, read_number: Callable[[Tensor], float | int | bool] | None = None) -> None:
        super().__init__()
        self.read_number = read_number
        self.kind = "other"
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        """Bytes by kind at the moment of the peak."""
        self.traffic: dict[Collective, Traffic] = {}
        self._storages: dict[int, _Storage] = {}
        self._bytes, self._peak_bytes = 0, 0
        self._resize = torch.UntypedStorage.resize_

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes no results, so compilation may stay enabled under it."""
        return True

    @property
    def peak_bytes(self) -> int:
        return self._peak_bytes

    def forget_peak(self) -> None:
        """Start again: the peak becomes what is alive now, and the traffic is cleared."""
        self._peak_bytes, self.peak = self._bytes, Counter(self.alive)
        self.traffic.clear()

    @contextmanager
    def booked_as(self, kind: str) -> Iterator[None]:
        outer, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = outer

    def book(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Record the memory of these tensors under `kind`, whatever its kind was before."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None:
                self._add(storage, kind)
            elif known.kind != kind:
                self.alive[known.kind] -= known.size
                self.alive[kind] += known.size
                known.kind = kind

    # ---- following storages

    def __enter__(self) -> TensorLedger:
        ledger, resize = self, self._resize

        def followed_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            known = ledger._storages.get(storage._cdata)
            if known is not None:
                ledger._change(known.kind, size - known.size)
                known.size = size
            return result

        # FSDP frees and restores its gathered parameters this way, which no dispatch mode sees
        torch.UntypedStorage.resize_ = followed_resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata

        def freed(reference: weakref.ref[torch.UntypedStorage]) -> None:
            known = self._storages.get(key)
            if known is not None and known.reference is reference:
                del self._storages[key]
                self._change(known.kind, -known.size)

        self._storages[key] = _Storage(weakref.ref(storage, freed), storage.nbytes(), kind)
        self._change(kind, storage.nbytes())

    def _change(self, kind: str, size: int) -> None:
        self.alive[kind] += size
        self._bytes += size
        if self._bytes > self._peak_bytes:
            self._peak_bytes, self.peak = self._bytes, Counter(self.alive)

    # ---- every operation

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on local tensors are dispatched again
        if func is torch.ops.aten._local_scalar_dense.default and self.read_number is not None:
            return self.read_number(args[0])
        if func is torch.ops.aten.nonzero.default:  # its length is unknown too; the maximum is assumed
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        is_communication = getattr(func, "namespace", None) in ("c10d", "_c10d_functional", "fsdp")
        if is_communication:
            self._count(func, args, result)
        kind = "communication buffers" if is_communication else self.kind
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._storages:
                self._add(leaf.untyped_storage(), kind)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        name = func.__name__.partition(".")[0]
        operation = next((word for part, word in _COLLECTIVES.items() if part in name), None)
        if operation is None or func.namespace == "fsdp":  # fsdp's operations only copy in and out of buffers
            return
        group = _group(args)
        # a gathered tensor is the result, or the largest argument if in place; a scattered one is an argument
        size = group.size()
        if size == 1:
            return
        payload = max(_nbytes(result), *(_nbytes(argument) for argument in args))
        sent = payload * (size - 1) // size * (2 if operation == "all-reduce" else 1)
        traffic = self.traffic.setdefault(Collective(operation, group.group_name, size), Traffic())
        traffic.calls += 1
        traffic.payload_bytes += payload
        traffic.sent_bytes += sent


def _nbytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    for argument in args:
        if isinstance(argument, dist.ProcessGroup):
            return argument
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument)
            except RuntimeError:  # not a group: a reduction, for instance
                continue
    name = next(argument for argument in reversed(args) if isinstance(argument, str))
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
