"""Inputs that a kernel would read or write wrongly are refused before it runs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from titan_peer.ops import cpu, peer_experts, product_key_retrieve, reference, rowwise_adamw_
from titan_peer.ops import triton as kernels
from titan_peer.ops.checks import MOST_PAIRS

ADAMW = {"grad_scale": 1.0, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
ADAMW |= {"bias_correction1": 0.1, "bias_correction2": 0.05, "seed": 1}
N, E, D = 6, 2, 8


def state(*dtypes: torch.dtype) -> list[Tensor]:
    return [torch.zeros(N, E, D, dtype=dtype) for dtype in dtypes]


def update(tables: list[Tensor], backend: ModuleType | None = None) -> None:
    pairs = reference.sort_pairs(torch.tensor([[0, 3], [3, 5]]), N)
    factors = (pairs, torch.ones(2, 2, E), torch.ones(2, D))
    (rowwise_adamw_ if backend is None else backend.rowwise_adamw_)(*tables, *factors, **ADAMW)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (state(F16, F32, F32), "param: has dtype float16, must be float32 or bfloat16"),
        (state(F32, F16, F16), "exp_avg: has dtype float16, must be float32 or bfloat16"),
        (state(F32, F32, F16), "exp_avg_sq: has dtype float16, must be float32 or bfloat16"),
        (state(F32, F32, BF16), "exp_avg_sq: has dtype torch.bfloat16, must be that of exp_avg"),
        ([*state(F32, F32), torch.zeros(N, dtype=BF16)], "exp_avg_sq: one number per row must be float32"),
        ([*state(F32, F32), torch.zeros(N + 1)], "must have the shape of param"),
        ([torch.zeros(N, D, E).transpose(1, 2), *state(F32, F32)], "param: has strides .*, must be contiguous"),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("backend", [None, cpu, kernels])
def test_state_that_a_kernel_would_misread_is_refused(
    backend: ModuleType | None, tables: list[Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        update(tables, backend)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16), (BF16, F32, F32), (BF16, BF16, BF16)])
def test_every_dtype_of_state_that_is_allowed_is_updated(dtypes: tuple[torch.dtype, ...]) -> None:
    for second in (False, True):
        tables = state(*dtypes[:2], F32)[:2]
        tables.append(torch.zeros(N) if second else torch.zeros(N, E, D, dtype=dtypes[2]))
        update(tables)
        assert tables[0][[0, 3, 5]].ne(0).all() and not tables[0][[1, 2, 4]].any()


@pytest.mark.parametrize("backend", [cpu, reference, kernels])
def test_more_pairs_than_int32_can_number_are_refused(backend: ModuleType) -> None:
    many = torch.zeros(1, 1, dtype=torch.int64).expand(MOST_PAIRS + 1, 1)  # takes no memory
    with pytest.raises(ValueError, match=r"pairs at once: must be at most 2,147,479,552"):
        backend.sort_pairs(many, N)
    with pytest.raises(ValueError, match=r"2,147,483,648 experts: must be at most"):
        backend.sort_pairs(torch.zeros(1, 1, dtype=torch.int64), 2**31)


@pytest.mark.parametrize("backend", [cpu, reference])
def test_sorting_refuses_an_expert_that_is_not_there(backend: ModuleType) -> None:
    with pytest.raises(IndexError, match="up to 6; must be at most 5"):
        backend.sort_pairs(torch.tensor([[0, 6], [2, -1]]), N)
    assert backend.sort_pairs(torch.tensor([[0, 5], [2, -1]]), N).row_ids.tolist() == [0, 2, 5]


def test_inputs_of_other_kinds_are_refused_by_name() -> None:
    x, indices, gates = torch.randn(3, D), torch.randint(N, (3, 2)), torch.rand(3, 2)
    tables = (torch.randn(N, 1, D), torch.randn(N, 1, D))
    with pytest.raises(ValueError, match="indices: has dtype int32, must be int64"):
        peer_experts(x, indices.int(), gates, *tables)
    with pytest.raises(ValueError, match="expert_down: has dtype int8, must be float32 or bfloat16"):
        peer_experts(x, indices, gates, tables[0].to(torch.int8), tables[1])
    with pytest.raises(ValueError, match="x on cpu, indices on meta"):
        peer_experts(x, indices.to("meta"), gates, *tables)
    queries, keys = torch.randn(3, 4, 8), torch.randn(4, 5, 4)
    with pytest.raises(ValueError, match=r"sub_keys\[1\] has 3 sets: must be 1 or one per head, 4"):
        product_key_retrieve(queries, [keys, keys[:3]], 2)
    with pytest.raises(ValueError, match="queries: has dtype int64"):
        product_key_retrieve(queries.long(), [keys.long(), keys.long()], 2)


def test_a_table_at_an_odd_address_is_refused_not_read() -> None:
    memory = bytearray(4 * N * D + 1)
    table = torch.frombuffer(memory, dtype=torch.float32, offset=1, count=N * D).view(N, 1, D)
    x, indices, gates = torch.randn(3, D), torch.randint(N, (3, 2)), torch.rand(3, 2)
    with pytest.raises(ValueError, match="address that is not a multiple of its element size"):
        cpu.peer_forward(x, indices, gates, table, torch.randn(N, 1, D), "gelu")


def test_int32_indices_of_a_backend_are_widened_not_misread() -> None:
    indices = torch.randint(N, (3, 2))
    x, gates, tables = torch.randn(3, D), torch.rand(3, 2), (torch.randn(N, 1, D), torch.randn(N, 1, D))
    wide, narrow = (cpu.peer_forward(x, i, gates, *tables, "gelu") for i in (indices, indices.int()))
    assert torch.equal(wide[0], narrow[0])
