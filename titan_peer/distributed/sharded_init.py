"""Random initial weights that do not depend on how a model is sharded over processes.

Inside `sharded_init(seed)` every `nn.init.normal_` fills its tensor in chunks of rows, each from a generator seeded
with (seed, number of the call, number of the chunk). A process that holds a part of a tensor fills only the chunks that
overlap its part. So a table too large for one process is never created whole, and any sharding gives the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.overrides import TorchFunctionMode

_CHUNK_ELEMENTS = 1 << 20


class sharded_init(TorchFunctionMode):  # noqa: N801 - a context manager, used like a function
    """Context manager; see the module's docstring.

    Args:
        seed: for all weights that are initialised inside.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.calls = seed, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.init.normal_:
            self.calls += 1
            return _fill_normal(*args, **(kwargs or {}), seed=self.seed, call=self.calls)
        return func(*args, **(kwargs or {}))


def _fill_normal(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: None = None, *, seed: int, call: int
) -> Tensor:
    local, shape, offset = tensor, tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if local.numel() == 0:
        return tensor
    rows_per_chunk = max(1, _CHUNK_ELEMENTS * shape[0] // max(tensor.numel(), 1))
    first, last = offset[0], offset[0] + local.shape[0]
    columns = tuple(slice(start, start + size) for start, size in zip(offset[1:], local.shape[1:]))
    chunk_generator = torch.Generator(local.device)
    for chunk in range(first // rows_per_chunk, -(-last // rows_per_chunk)):
        start, stop = chunk * rows_per_chunk, min((chunk + 1) * rows_per_chunk, shape[0])
        chunk_seed = hashlib.sha256(repr((seed, call, chunk)).encode()).digest()[:7]
        chunk_generator.manual_seed(int.from_bytes(chunk_seed, "little"))
        values = torch.empty(stop - start, *shape[1:], dtype=local.dtype, device=local.device)
        values.normal_(mean, std, generator=chunk_generator)
        low, high = max(start, first), min(stop, last)
        local[low - first : high - first].copy_(values[(slice(low - start, high - start), *columns)])
    return tensor
