"""The attention mask, made from runs of documents, compared with PyTorch's, made from every pair of positions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_peer.ops.attention import attention_backend, causal_block_mask, causal_mask, flex_kernel_options

CPU = torch.device("cpu")


def packed_ids(batch_size: int, seq_len: int, longest: int, seed: int) -> Tensor:
    """Ids of random documents; negative ids at the end of each sequence are padding."""
    draw, rows = random.Random(seed), []
    for _ in range(batch_size):
        padding, row = draw.randrange(seq_len // 3 + 1), []
        while len(row) < seq_len - padding:
            row += [row[-1] + 1 if row else 0] * draw.randint(1, longest)
        rows.append([*row[: seq_len - padding], *range(-1, -1 - padding, -1)])
    return torch.tensor(rows, dtype=torch.int32)


def pytorchs(ids: Tensor | None, seq_len: int) -> BlockMask:
    def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) if ids is None else (q >= kv) & (ids[b, q] == ids[b, kv])

    return create_block_mask(allowed, None if ids is None else len(ids), None, seq_len, seq_len, device="cpu")


def require_equal(ours: BlockMask, theirs: BlockMask) -> None:
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, expected = (getattr(mask, f"{name}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(counts, expected) and counts.dtype == expected.dtype, name
        places, expected = (getattr(mask, f"{name}_indices") for mask in (ours, theirs))
        assert places.shape == expected.shape and places.dtype == expected.dtype, name
        listed = torch.arange(places.shape[-1]) < counts[..., None]
        assert torch.equal(places[listed], expected[listed]), name


@pytest.mark.parametrize("seq_len", [1, 100, 128, 300, 1024])
@pytest.mark.parametrize("longest", [3, 150, 2000])
def test_block_mask_equals_pytorchs_of_every_pair(seq_len: int, longest: int) -> None:
    ids = packed_ids(3, seq_len, longest, seed=seq_len + longest)
    mask = causal_block_mask(ids, seq_len, CPU)
    require_equal(mask, pytorchs(ids, seq_len))
    # and within blocks, position by position, like the mask that a CPU uses
    b, q, kv = (torch.arange(n) for n in (3, seq_len, seq_len))
    inside = mask.mask_mod(b[:, None, None], torch.tensor(0), q[:, None], kv)
    assert torch.equal(inside, causal_mask(ids, 3, seq_len, CPU)[:, 0])
    expected = (ids[:, :, None] == ids[:, None]) & (q[:, None] >= kv)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("seq_len", [100, 512])
def test_block_mask_without_documents_is_causal(seq_len: int) -> None:
    require_equal(causal_block_mask(None, seq_len, CPU), pytorchs(None, seq_len))


def test_runs_of_the_same_id_that_do_not_touch_are_two_documents() -> None:
    ids = torch.tensor([[5] * 130 + [2] * 130 + [5] * 130])
    mask = causal_mask(ids, 1, 390, CPU)
    assert not mask[0, 0, 260:, :260].any() and mask[0, 0, 389, 260:].all()
    block_mask, place = causal_block_mask(ids, 390, CPU), torch.arange(390)
    inside = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place)
    assert torch.equal(inside, mask[0, 0])
    require_equal(block_mask, pytorchs(torch.tensor([[0] * 130 + [1] * 130 + [2] * 130]), 390))


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor))
        self.nbytes = max([self.nbytes, *made])
        return out


def test_block_mask_of_long_sequences_takes_no_memory_of_every_pair() -> None:
    ids = packed_ids(8, 8192, 1500, seed=0)
    with LargestTensor() as largest:
        causal_block_mask(ids, 8192, CPU)
    assert largest.nbytes <= 8 * 8192 * 8  # a few numbers per token; all pairs would be 8 x 8192 x 8192


def shared_bytes(options: dict[str, int], qk: int, v: int, element_size: int) -> tuple[int, int]:
    """Shared memory of a forward and a backward program: see the table of measurements in pytorch/pytorch#180278."""
    keys = options["fwd_num_stages"] * options["fwd_BLOCK_N"] * (qk + v)
    backward = (options["bwd_BLOCK_N1"] + options["bwd_num_stages"] * options["bwd_BLOCK_M1"]) * (qk + v)
    return (options["fwd_BLOCK_M"] * qk + keys) * element_size, backward * element_size


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("qk", "v"), [(192, 128), (144, 64), (256, 256), (192, 192)])
def test_tiles_fit_gpus_of_little_shared_memory(qk: int, v: int, element_size: int) -> None:
    of_8_6 = 99 << 10
    options = flex_kernel_options(qk, v, element_size, of_8_6)
    assert options is not None
    assert max(shared_bytes(options, qk, v, element_size)) <= of_8_6 - (10 << 10)
    assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0 == options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"]
    assert all(128 % options[f"fwd_BLOCK_{side}"] == 0 for side in "MN")


def test_tiles_are_pytorchs_where_those_fit() -> None:
    assert flex_kernel_options(192, 128, 2, 163 << 10) is None  # compute capability 8.0
    assert flex_kernel_options(128, 128, 2, 99 << 10) is None
    assert flex_kernel_options(192, 128, 2, 99 << 10)["fwd_BLOCK_M"] == 128  # type: ignore[index]


def test_the_banner_says_that_tiles_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_peer.ops.attention._shared_memory", lambda device: 99 << 10)
    cuda = torch.device("cuda", 0)
    assert "smaller tiles for head dim 192" in attention_backend(cuda, 192, 128)
    assert "tiles" not in attention_backend(cuda, 128, 128)
