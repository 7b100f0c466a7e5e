"""Batches for a process, out of the one stream that all processes share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from titan_peer.data.packing import PackedSequence, TokenStream, pack, pad_span
from titan_peer.data.sources import DataSource, read_documents
from titan_peer.data.tokenizer import Tokenizer

Batch = dict[str, Tensor]
"""tokens, labels (-100: not learnt) int64 [B, S]; document_ids int32 [B, S]; num_bytes float64 0-d."""


def _collate(sequences: Sequence[PackedSequence]) -> Batch:
    return {
        "tokens": torch.from_numpy(np.stack([s.tokens for s in sequences])),
        "labels": torch.from_numpy(np.stack([s.labels for s in sequences])),
        "document_ids": torch.from_numpy(np.stack([s.document_ids for s in sequences])),
        "num_bytes": torch.tensor(sum(s.num_bytes for s in sequences), dtype=torch.float64),
    }


class TrainingLoader:
    """Endless micro-batches of one process.

    A global batch is the next `global_batch_size` sequences of the stream, cut into micro-steps x processes x
    local_batch_size in that order: what is learnt in a step does not depend on the number of processes.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self.stream, self.seq_len = stream, seq_len
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.sequences_seen = 0  # of the whole stream, by all processes, up to the last whole global batch
        self._micro_step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        per_micro_step = self.local_batch_size * self.dp_world_size
        first = self.sequences_seen + self._micro_step * per_micro_step + self.dp_rank * self.local_batch_size
        numbers = range(first, first + self.local_batch_size)
        spans = [self.stream.span(i * self.seq_len, self.seq_len + 1) for i in numbers]
        self._micro_step += 1
        if self._micro_step * per_micro_step == self.global_batch_size:
            self.sequences_seen += self.global_batch_size
            self._micro_step = 0
        return _collate([pack(span) for span in spans])

    def state_dict(self) -> dict[str, int]:
        """The position in the stream; the same for all processes."""
        return {"sequences_seen": self.sequences_seen, "seq_len": self.seq_len}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the tokens that were seen, also with another sequence length or batch size."""
        self.sequences_seen = state["sequences_seen"] * state["seq_len"] // self.seq_len
        self._micro_step = 0


class ValidationLoader:
    """One pass over held-out text in fixed order; every process gets equally many batches, the last ones padded."""

    def __init__(
        self, stream: TokenStream, *, seq_len: int, local_batch_size: int, dp_rank: int, dp_world_size: int, pad: int
    ) -> None:
        self.stream, self.seq_len, self.local_batch_size, self.pad = stream, seq_len, local_batch_size, pad
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        num_sequences = -(-max(stream.tokens_per_epoch - 1, 1) // seq_len)
        self.num_batches = -(-num_sequences // (local_batch_size * dp_world_size))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self.num_batches):
            first = (i * self.dp_world_size + self.dp_rank) * self.local_batch_size
            yield _collate([self._sequence(first + j) for j in range(self.local_batch_size)])

    def _sequence(self, number: int) -> PackedSequence:
        start = min(number * self.seq_len, self.stream.tokens_per_epoch)
        length = min(self.seq_len + 1, self.stream.tokens_per_epoch - start)
        span = self.stream.span(start, length) if length else self.stream.span(0, 1)
        return pack(pad_span(span, self.seq_len + 1, self.pad))


def build_dataloader(
    *,
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    local_batch_size: int,
    dp_rank: int,
    dp_world_size: int,
    seed: int,
    shuffle: bool = True,
) -> TrainingLoader:
    """The endless training batches of process `dp_rank` of `dp_world_size`.

    Raises:
        UserError: a source cannot be read.
    """
    stream = TokenStream(read_documents(sources, "data"), tokenizer, seed=seed, shuffle=shuffle)
    return TrainingLoader(
        stream,
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
    )


def build_validation_dataloader(
    *,
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_world_size: int,
) -> ValidationLoader:
    """One pass over held-out text.

    Raises:
        UserError: a source cannot be read.
    """
    stream = TokenStream(read_documents(sources, "validation"), tokenizer, seed=0, shuffle=False)
    pad = tokenizer.eos_id or 0
    return ValidationLoader(
        stream,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        pad=pad,
    )
