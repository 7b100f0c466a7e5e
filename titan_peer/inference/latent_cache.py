"""The latent KV cache, in pages.

MLA needs `kv_lora_rank + qk_rope_head_dim` numbers per token and layer, independent of the number of heads (arXiv
2405.04434, section 2.1). They are stored in blocks of 64 tokens, and a sequence's block table lists its blocks. So
sequences of any length share one pool, start and end at any time, and leave at most 63 places empty each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_peer.model import ModelArgs

BLOCK_SIZE = 64
"""Tokens per block (the size that FlashMLA's kernels read)."""
_SCRATCH = 0  # this block belongs to no sequence: the padding of ragged batches is written there


def blocks_for(num_tokens: int) -> int:
    """The number of blocks for `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def cache_bytes_per_token(args: ModelArgs, dtype: torch.dtype) -> int:
    """Bytes per token in the caches of all layers."""
    return args.n_layers * (args.mla.kv_lora_rank + args.mla.qk_rope_head_dim) * dtype.itemsize


class LatentCache:
    """Pools of blocks, one per layer, that share their block numbers.

    Args:
        num_blocks: blocks that sequences can reserve; one more is made for padding.
    """

    def __init__(self, args: ModelArgs, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        width = args.mla.kv_lora_rank + args.mla.qk_rope_head_dim
        # Zeros, because places without a token are masked but must be finite.
        self.layers = [
            torch.zeros(num_blocks + 1, BLOCK_SIZE, width, device=device, dtype=dtype) for _ in range(args.n_layers)
        ]
        self._free = list(range(num_blocks, _SCRATCH, -1))

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def reserve(self, num_tokens: int) -> list[int]:
        """Reserve blocks for a sequence of up to `num_tokens`; the caller makes sure that enough are free."""
        return [self._free.pop() for _ in range(blocks_for(num_tokens))]

    def release(self, blocks: Sequence[int]) -> None:
        self._free.extend(reversed(blocks))


class CacheStep(NamedTuple):
    """Where the new tokens of one forward pass are stored and what each of them sees. B sequences, at most S new
    tokens."""

    positions: Tensor  # int64 [B, S], positions of the new tokens in their sequences
    slots: Tensor  # int64 [B * S], places in the flattened pool, the scratch block for padding
    block_table: Tensor  # int32 [B, blocks], those that hold tokens after this step
    lengths: Tensor  # int32 [B], tokens after this step
    mask: Tensor | None  # bool [B, 1, S, blocks * 64]; None if no sequence had tokens before: plain causal
    last: Tensor  # int64 [B], place of each sequence's last new token in S


class CacheBatch:
    """The sequences that take part in some forward passes.

    Args:
        blocks: the blocks of each sequence.
        lengths: tokens per sequence that are in the cache.
    """

    def __init__(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device) -> None:
        widest = max(map(len, blocks))
        table = [[*own, *[_SCRATCH] * (widest - len(own))] for own in blocks]
        self.table = torch.tensor(table, dtype=torch.int32, device=device)
        self.lengths = list(lengths)

    def step(self, new: Sequence[int]) -> CacheStep:
        """The next forward pass, in which sequence b gets new[b] tokens, padded on the right to max(new)."""
        device = self.table.device
        before = torch.tensor(self.lengths, device=device)
        counts = torch.tensor(new, device=device)
        offsets = torch.arange(max(new), device=device)
        is_token = offsets < counts[:, None]  # [B, S]
        positions = before[:, None] + torch.minimum(offsets, counts[:, None] - 1)
        block = self.table.gather(1, positions // BLOCK_SIZE).long()
        slots = torch.where(is_token, block * BLOCK_SIZE + positions % BLOCK_SIZE, _SCRATCH)

        mask, longest = None, max(length + count for length, count in zip(self.lengths, new))
        table = self.table[:, : blocks_for(longest)]
        if any(self.lengths):
            places = torch.arange(table.shape[1] * BLOCK_SIZE, device=device)
            mask = (places <= positions[:, :, None])[:, None]
        self.lengths = [length + count for length, count in zip(self.lengths, new)]
        return CacheStep(
            positions=positions,
            slots=slots.flatten(),
            block_table=table,
            lengths=(before + counts).int(),
            mask=mask,
            last=counts - 1,
        )
