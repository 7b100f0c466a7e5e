"""Batches for one process, from one order of sequences that does not depend on the number of processes or workers.

The documents are read by a fixed number of streams (`data.num_streams`), each with its own mix, shuffle and packing.
Sequence i of the job is the next one of stream i modulo the number of streams. Each of n readers (a process, or one of
its workers) makes every n-th sequence. If n divides the number of streams, a reader reads only its own streams;
otherwise some streams are read by several readers, each of which discards the others' sequences. The state is the place
of every stream after the last whole global batch, whichever reader read it, so any number of processes and workers can
continue from it.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
import os
import signal
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_peer.common.errors import TransientError, UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Data
from titan_peer.data.packing import PackedSequence, PackingFormat
from titan_peer.data.pipeline import Batch, PackedStream, Pipeline, collate
from titan_peer.data.resume import continue_sources, described, order_settings, require_same_order
from titan_peer.data.sources import open_sources
from titan_peer.data.special_tokens import missing
from titan_peer.data.streams import State
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.distributed.collectives import max_over_processes, on_all_processes, sum_over_processes

_STATE_FORMAT = 1

logger = logging.getLogger("titan_peer")


class ReadSequence(NamedTuple):
    """What a reader yields."""

    stream: int
    sequence: PackedSequence
    skipped: NDArray[np.int64]  # [sources], by this stream


class ReadError(NamedTuple):
    """A UserError or TransientError on its way out of a worker process."""

    kind: type[UserError | TransientError]
    message: str


class SequenceReader(IterableDataset[ReadSequence | ReadError]):
    """The sequences of one process, or of one of its workers.

    Args:
        first: number of the first sequence, counted over all processes.
        streams: the states of the streams at that place.
    """

    def __init__(self, pipeline: Pipeline, rank: int, world_size: int, first: int, streams: dict[str, State]) -> None:
        self.pipeline, self.rank, self.world_size = pipeline, rank, world_size
        self.first, self.start = first, streams
        self._streams: dict[int, PackedStream] = {}

    def __iter__(self) -> Iterator[ReadSequence | ReadError]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first = self.first + self.rank + self.world_size * worker_id
        try:
            for i in itertools.count(first, self.world_size * workers):
                yield self._read(i)
        except (UserError, TransientError) as error:
            yield ReadError(type(error), str(error))

    def _read(self, number: int) -> ReadSequence:
        """Sequence `number` of the job."""
        position, which = divmod(number, self.pipeline.num_streams)
        if which not in self._streams:
            self._streams[which] = self.pipeline.stream(which)
            if str(which) in self.start:
                self._streams[which].load_state_dict(self.start[str(which)])
        stream = self._streams[which]
        while stream.position < position:  # sequences of other readers
            stream.next()
        sequence = stream.next() or self.pipeline.format.empty()
        return ReadSequence(which, sequence, stream.skipped())

    def state_dict(self) -> dict[str, State]:
        return {str(which): stream.state_dict() for which, stream in self._streams.items()}

    def load_state_dict(self, state: dict[str, State]) -> None:
        raise NotImplementedError("a reader starts from the states given to its constructor")


def merge_streams(states: Sequence[dict[str, State]]) -> dict[str, State]:
    """The state of every stream, each from the reader that is furthest along in it."""
    merged: dict[str, State] = {}
    for state in states:
        for which, stream in state.items():
            if which not in merged or stream["position"] > merged[which]["position"]:
                merged[which] = stream
    return merged


class TrainingLoader:
    """Endless micro-batches of one process.

    A global batch is the next `global_batch_size` sequences of the job, dealt to the processes in turn. After all
    sources have ended (data.sources[i].max_epochs), batches contain only padding.

    Raises (from next):
        UserError: a document or file is bad.
        TransientError: a disk or the network has failed.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        pin_memory: bool = False,
    ) -> None:
        self.pipeline, self.data = pipeline, pipeline.data
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.dp_rank, self.dp_world_size, self.pin_memory = dp_rank, dp_world_size, pin_memory
        self.sequences_seen = 0  # by all processes, up to the last whole global batch
        self._micro_step = 0
        self._start(0, {}, {})
        # Runs before the libraries' own hooks, which would wait for the workers and then kill them with an error.
        atexit.register(_close, weakref.ref(self))

    def _start(self, sequences_seen: int, streams: dict[str, State], sources: dict[str, State]) -> None:
        self.sequences_seen, self._start_streams = sequences_seen, streams
        self._before = sources  # totals per source over all processes
        shape = (self.pipeline.num_streams, len(self.pipeline.sources))
        self._tokens = np.zeros(shape[1], dtype=np.int64)  # by this process, since the start
        self._skipped = np.zeros(shape, dtype=np.int64)
        self._epochs = np.zeros(shape, dtype=np.int64)
        self._loader: StatefulDataLoader | None = None
        self._items: Iterator[ReadSequence | ReadError] = iter(())

    def _open(self) -> StatefulDataLoader:
        """Start reading. Worker processes start here, once the place to begin from is known."""
        reader = SequenceReader(
            self.pipeline, self.dp_rank, self.dp_world_size, self.sequences_seen, self._start_streams
        )
        workers = self.data.num_workers
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            return StatefulDataLoader(
                reader,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=workers,
                prefetch_factor=self.data.prefetch_factor * self.local_batch_size if workers else None,
                multiprocessing_context="fork" if workers else None,
                worker_init_fn=_prepare_worker if workers else None,
                # the state is read only after whole global batches
                snapshot_every_n_steps=self.global_batch_size // self.dp_world_size,
                # a generator of its own: each start of the loader draws from it, not from the global random state
                generator=torch.Generator(),
            )

    def close(self) -> None:
        """End the worker processes; the place in the data is lost."""
        self._items = iter(())
        self._loader = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._loader is None:
            self._loader = self._open()
            self._items = iter(self._loader)
        sequences = []
        for item in itertools.islice(self._items, self.local_batch_size):
            if isinstance(item, ReadError):
                raise item.kind(item.message)
            sequences.append(item.sequence)
            self._tokens += item.sequence.source_tokens
            self._skipped[item.stream] = item.skipped
            self._epochs[item.stream] = np.maximum(self._epochs[item.stream], item.sequence.epochs)
        self._micro_step += 1
        if self._micro_step * self.local_batch_size * self.dp_world_size == self.global_batch_size:
            self.sequences_seen += self.global_batch_size
            self._micro_step = 0
        return collate(sequences, self.pin_memory)

    def _totals(self) -> dict[str, dict[str, int]]:
        """Per source, over the whole job and all processes: tokens, current epoch, bad documents skipped."""
        tokens = torch.from_numpy(self._tokens.copy())
        latest = torch.from_numpy(np.stack([self._skipped, self._epochs]))
        if self.dp_world_size > 1:
            sum_over_processes(tokens)
            max_over_processes(latest)
        skipped, epochs = latest[0].sum(0).tolist(), latest[1].amax(0).tolist()
        totals = {}
        for i, source in enumerate(self.pipeline.sources):
            before = self._before.get(source.name, {"tokens": 0, "epoch": 0, "skipped": 0})
            totals[source.name] = {
                "tokens": before["tokens"] + int(tokens[i]),
                # streams that have not been read since a resume have not reported these yet
                "epoch": max(before["epoch"], epochs[i]),
                "skipped": max(before["skipped"], skipped[i]),
            }
        return totals

    def statistics(self) -> dict[str, float | int]:
        """Per source: tokens so far, their share, current epoch, bad documents skipped. Every process must call it."""
        record: dict[str, float | int] = {}
        totals = self._totals()
        all_tokens = sum(entry["tokens"] for entry in totals.values())
        for name, entry in totals.items():
            record[f"data/{name}_share"] = round(entry["tokens"] / max(all_tokens, 1), 5)
            record.update({f"data/{name}_{what}": value for what, value in entry.items()})
        return record

    def state_dict(self) -> State:
        """The place of every stream after the last global batch, the same for all processes. Called by every process.

        It takes a few hundred bytes per stream and source, however much has been read.
        """
        assert self._micro_step == 0, "the state can be read only after a whole global batch"
        own = merge_streams([self._start_streams, *_reader_states(self._loader)])
        streams = merge_streams(on_all_processes(lambda: own)) if self.dp_world_size > 1 else own
        totals = self._totals()
        return {
            "format": _STATE_FORMAT,
            "sequences_seen": self.sequences_seen,
            "num_streams": self.pipeline.num_streams,
            "seq_len": self.pipeline.format.seq_len,
            "packing": self.data.packing,
            "mix_by": self.data.mix_by,
            "settings": order_settings(self.pipeline),
            "sources": {s.name: {**described(s), **totals[s.name]} for s in self.pipeline.sources},
            "streams": streams,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue after what was seen, also on other numbers of processes and workers, with other weights or more data.

        Raises:
            UserError: the data are not the checkpoint's, or a setting was changed that the saved places depend on.
        """
        self._settle_streams(state)
        for key in ("packing", "mix_by"):
            if getattr(self.data, key) != state[key]:
                raise UserError(
                    f"data.{key} = {getattr(self.data, key)!r}: the checkpoint was made with {state[key]!r}, and its place "
                    "in the data is valid only with that"
                )
        seq_len = self.pipeline.format.seq_len
        if self.data.packing == "best_fit" and seq_len != state["seq_len"]:
            raise UserError(
                f'training.seq_len = {seq_len}: with data.packing = "best_fit" a job can resume only with the checkpoint\'s '
                f"{state['seq_len']}"
            )
        require_same_order(state.get("settings", {}), self.pipeline)
        state = continue_sources(state, self.pipeline.sources)
        self._start(state["sequences_seen"], state["streams"], state["sources"])
        self._micro_step = 0

    def _settle_streams(self, state: State) -> None:
        if state.get("format") != _STATE_FORMAT:
            raise UserError("the checkpoint's place in the data was saved by another version and cannot be used")
        saved, chosen = state["num_streams"], self.data.num_streams
        if chosen not in (0, saved):
            raise UserError(
                f"data.num_streams = {chosen}: the checkpoint was made with {saved}; set it to that, or to 0"
            )
        if saved != self.pipeline.num_streams:
            self.pipeline.num_streams = saved
            for source in self.pipeline.sources:
                source.divide(saved)


def _close(loader: weakref.ref[TrainingLoader]) -> None:
    alive = loader()
    if alive is not None:
        alive.close()


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(_worker_id: int) -> None:
    """One thread per worker: thread pools of torch and the tokenizer do not survive a fork, and there are several workers.

    Ctrl-C reaches the workers too, but it is the training process that saves and ends them.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _reader_states(loader: StatefulDataLoader | None) -> list[dict[str, State]]:
    """The states of this process's readers after the last sequence taken from each."""
    if loader is None:
        return []
    state = loader.state_dict()
    if "_snapshot" not in state:
        return [state["dataset_state"]]
    workers = state["_snapshot"]["_worker_snapshots"].values()
    return [worker["dataset_state"] for worker in workers if worker["dataset_state"] is not None]


class ValidationSet:
    """One pass over a held-out source in its order; every process gets equally many batches, the last ones padded.

    What has been read is kept in memory, so that later validations neither read nor tokenise again.
    """

    def __init__(self, sequences: PackedStream, format: PackingFormat, batch_size: int, rank: int, world: int) -> None:
        self._unread = self._read(sequences, format, batch_size, rank, world)
        self._batches: list[list[PackedSequence]] = []
        self._failure: Exception | None = None

    def read_ahead(self, max_batches: int) -> int:
        """Read the first `max_batches` batches (-1: all) unless they have been read; return how many of them there are.

        Raises:
            UserError: a document or file is bad.
            TransientError: a disk or the network has failed.
        """
        while max_batches < 0 or len(self._batches) < max_batches:
            if self._failure is not None:  # what was read before the failure is not the whole set
                raise self._failure
            try:
                batch = next(self._unread, None)
            except Exception as failure:
                self._failure = failure
                raise
            if batch is None:
                break
            self._batches.append(batch)
        return len(self._batches) if max_batches < 0 else min(len(self._batches), max_batches)

    @staticmethod
    def _read(
        sequences: PackedStream, format: PackingFormat, batch_size: int, rank: int, world: int
    ) -> Iterator[list[PackedSequence]]:
        while True:
            everyones = [s for _ in range(batch_size * world) if (s := sequences.next()) is not None]
            if not everyones:
                return
            everyones += [format.empty()] * (batch_size * world - len(everyones))
            yield everyones[rank * batch_size : (rank + 1) * batch_size]

    def __iter__(self) -> Iterator[Batch]:
        for i in itertools.count():
            if self.read_ahead(i + 1) <= i:
                return
            yield collate(self._batches[i])


class ValidationLoader:
    """The held-out sets by name; iterating goes through all of them."""

    def __init__(self, sets: dict[str, ValidationSet]) -> None:
        self.sets = sets

    def __iter__(self) -> Iterator[Batch]:
        return itertools.chain.from_iterable(self.sets.values())


def build_dataloader(
    *,
    data: Data,
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    local_batch_size: int,
    dp_rank: int,
    dp_world_size: int,
    seed: int,
    pin_memory: bool = False,
) -> TrainingLoader:
    """The endless training batches of process `dp_rank` of `dp_world_size`.

    Raises:
        UserError: a source cannot be read.
    """
    for warning in missing(tokenizer.specials, data):
        logger.warning("%s", warning)
    readers = dp_world_size * max(data.num_workers, 1)
    sources, num_streams = open_sources(data.sources, "data", data.num_streams, data.network_retries, readers)
    pipeline = Pipeline(sources, tokenizer, data, seq_len=seq_len, seed=seed, num_streams=num_streams)
    for source in sources:
        _ = source.identity  # computed now: the files may change while the job runs
    if num_streams % readers:
        smallest = min(sources, key=lambda source: source.sensible_streams(readers))
        why = f" (the most that {smallest.name} has documents for)" if not data.num_streams else ""
        logger.info(
            "data.num_streams = %d%s is not a multiple of processes x data.num_workers = %d: some documents are tokenised "
            "by several of them",
            num_streams,
            why,
            readers,
        )
    return TrainingLoader(
        pipeline,
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        pin_memory=pin_memory,
    )


def build_validation_dataloader(
    *,
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_world_size: int,
    data: Data | None = None,
) -> ValidationLoader:
    """One pass over each held-out source.

    Args:
        data: the training data's settings; packing and begin and end tokens are taken from it.
    Raises:
        UserError: a source cannot be read.
    """
    settings = dataclasses.replace(data or Data(), shuffle=False, mix_by="tokens")
    once = [dataclasses.replace(source, max_epochs=1, weight=1.0) for source in sources]
    opened, _ = open_sources(once, "validation", num_streams=1, retries=settings.network_retries)
    sets = {}
    for source in opened:
        pipeline = Pipeline([source], tokenizer, settings, seq_len=seq_len, seed=0, num_streams=1)
        sets[source.name] = ValidationSet(pipeline.stream(0), pipeline.format, local_batch_size, dp_rank, dp_world_size)
    return ValidationLoader(sets)
