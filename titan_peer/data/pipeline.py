"""One stream of a job from end to end: sources -> documents -> packing and mixing -> sequences; and batches of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titan_peer.config.job import Data
from titan_peer.data.mixing import DocumentMixture, SequenceMixture, WeightedDraw
from titan_peer.data.packing import PackedSequence, Packer, PackingFormat, make_packer
from titan_peer.data.sources import Source
from titan_peer.data.streams import DocumentEncoder, DocumentStream, State, require_same_tokenizer
from titan_peer.data.tokenizer import Tokenizer

Batch = dict[str, Tensor]
"""tokens, labels (-100: not learnt) int64 [B, S]; document_ids int32 [B, S]; num_bytes
float64 0-d, UTF-8 bytes of the text that the labels stand for."""


def collate(sequences: Sequence[PackedSequence], pin_memory: bool = False) -> Batch:
    def stack(field: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.stack([getattr(s, field) for s in sequences])).to(dtype)

    batch = {
        "tokens": stack("tokens", torch.int64),
        "labels": stack("labels", torch.int64),
        "document_ids": stack("document_ids", torch.int32),
        "num_bytes": torch.tensor(sum(s.num_bytes for s in sequences), dtype=torch.float64),
    }
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch


class Pipeline:
    """Makes the streams of a job, and holds what they share."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        data: Data,
        *,
        seq_len: int,
        seed: int,
        num_streams: int,
    ) -> None:
        self.sources, self.data, self.seed, self.num_streams = sources, data, seed, num_streams
        self.encoder = DocumentEncoder(tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
        self.format = PackingFormat(
            seq_len, len(sources), pad_token=tokenizer.eos_id or 0, mask_borders=data.mask_document_borders
        )
        for source in sources:
            require_same_tokenizer(source, tokenizer)

    def stream(self, stream: int) -> PackedStream:
        documents = [
            DocumentStream(
                source,
                number,
                self.encoder,
                stream=stream,
                num_streams=self.num_streams,
                seed=self.seed,
                shuffle=self.data.shuffle,
                buffer_size=self.data.shuffle_buffer_size,
            )
            for number, source in enumerate(self.sources)
        ]
        by_tokens = self.data.mix_by == "tokens"
        unit = self.format.seq_len if by_tokens else 1
        head_start = unit * np.random.default_rng([self.seed, stream]).random(len(self.sources))
        configs = [source.config for source in self.sources]
        draw = WeightedDraw([s.name for s in self.sources], [c.weight for c in configs], head_start.tolist())
        if by_tokens:
            packers = [make_packer(self.data.packing, d, self.format) for d in documents]
            return PackedStream(SequenceMixture(packers, draw, configs), documents)
        mixture = DocumentMixture(documents, draw, configs)
        return PackedStream(make_packer(self.data.packing, mixture, self.format), documents)


class PackedStream:
    """The sequences of one stream, counted."""

    def __init__(self, sequences: SequenceMixture | Packer, documents: Sequence[DocumentStream]) -> None:
        self.sequences, self.documents = sequences, documents
        self.position = 0  # sequences made so far

    def next(self) -> PackedSequence | None:
        """The next sequence; None when all sources have ended."""
        self.position += 1
        return self.sequences.next()

    def skipped(self) -> NDArray[np.int64]:
        """Bad documents skipped, int64 [sources]."""
        return np.array([d.skipped for d in self.documents])

    def state_dict(self) -> State:
        return {"position": self.position, "sequences": self.sequences.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.position = state["position"]
        self.sequences.load_state_dict(state["sequences"])
