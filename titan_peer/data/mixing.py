"""Weighted mixes of sources.

By tokens (the usual meaning of a mix): each source is packed into its own sequences, and sequences are drawn so that
each source's share of the tokens is its weight. Drawing documents and packing them afterwards would let the shares
drift with the documents' lengths. By documents: documents are drawn so that each source's share of the documents is its
weight, and are then packed together.

Each draw takes the source that is furthest behind its weight, so shares are off by at most one draw per stream at any
time; a seeded head start per source and stream keeps the streams from drawing the same source at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from titan_peer.config.data_source import DataSource
from titan_peer.data.packing import PackedSequence, Packer
from titan_peer.data.streams import Document, DocumentStream, State


class WeightedDraw:
    """Decides which of several named things comes next, so that amounts stay in proportion to weights.

    Args:
        head_start: for each, the amount by which it counts as behind at the beginning.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], head_start: Sequence[float]) -> None:
        self.names, self.weights, self.head_start = list(names), list(weights), list(head_start)
        self.amounts = [0.0] * len(names)
        self.ended = [False] * len(names)

    def draw(self) -> int | None:
        """The one furthest behind its share, of those that have a weight and have not ended; None if there is none."""
        active = [i for i, weight in enumerate(self.weights) if weight > 0 and not self.ended[i]]
        if not active:
            return None
        total = sum(self.amounts[i] for i in active) / sum(self.weights[i] for i in active)
        return max(active, key=lambda i: self.weights[i] * total - self.amounts[i] + self.head_start[i])

    def add(self, which: int, amount: float) -> None:
        self.amounts[which] += amount

    def drop(self, which: int) -> None:
        """Continue without one of them; the others keep their proportions from here on."""
        self.ended[which] = True
        self.amounts = [0.0] * len(self.names)
        self.head_start = [0.0] * len(self.names)

    def state_dict(self) -> State:
        return {
            name: {
                "amount": self.amounts[i],
                "head_start": self.head_start[i],
                "ended": self.ended[i],
                "weight": self.weights[i],
            }
            for i, name in enumerate(self.names)
        }

    def load_state_dict(self, state: State, ended: Collection[str]) -> None:
        """Continue without those in `ended`. If names, weights or `ended` have changed, counting shares starts again at
        0."""
        self.ended = [name in ended for name in self.names]
        weights = {name: entry["weight"] for name, entry in state.items()}
        if weights == dict(zip(self.names, self.weights)) and {n for n in state if _has_ended(state[n])} == set(ended):
            for i, name in enumerate(self.names):
                self.amounts[i], self.head_start[i] = state[name]["amount"], state[name]["head_start"]


def _has_ended(entry: State) -> bool:
    """Whether a part had ended at the save. Older states have only `active`, which is also false for a weight of 0."""
    return bool(entry["ended"]) if "ended" in entry else not entry["active"] and entry["weight"] > 0


class Part(Protocol):
    """What a mixture draws from: DocumentStreams or Packers."""

    def next(self) -> Any: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Mixture:
    """Draws from the sources' parts; ends when all of them have ended, or one with at_end = "stop" has."""

    def __init__(self, parts: Sequence[Part], draw: WeightedDraw, sources: Sequence[DataSource]) -> None:
        self.parts, self.draw, self.sources = parts, draw, sources

    def _next(self) -> tuple[int, Any] | None:
        while not self._stopped() and (which := self.draw.draw()) is not None:
            item = self.parts[which].next()
            if item is not None:
                return which, item
            self.draw.drop(which)
        return None

    def _stopped(self) -> bool:
        return any(ended and source.at_end == "stop" for ended, source in zip(self.draw.ended, self.sources))

    def state_dict(self) -> State:
        return {
            "draw": self.draw.state_dict(),
            "parts": {name: part.state_dict() for name, part in zip(self.draw.names, self.parts)},
            "max_epochs": {name: source.max_epochs for name, source in zip(self.draw.names, self.sources)},
        }

    def load_state_dict(self, state: State) -> None:
        """Continue the sources of the same names; a source that is new, or has a larger max_epochs now, takes part
        again."""
        ended = {name for name, entry in state["draw"].items() if _has_ended(entry)}
        for name, part, source in zip(self.draw.names, self.parts, self.sources):
            if name in state["parts"]:
                part.load_state_dict(state["parts"][name])
                read = state["max_epochs"][name] if "max_epochs" in state else _epoch(state["parts"][name]) + 1
                if not source.max_epochs or source.max_epochs > read:
                    ended.discard(name)
        self.draw.load_state_dict(state["draw"], ended)


def _epoch(part: State) -> int:
    """The epoch that a part's documents were in, for states that do not store max_epochs."""
    return int(part["documents"]["epoch"] if "documents" in part else part["epoch"])


class DocumentMixture(Mixture):
    """Documents of several sources in proportion to their numbers."""

    def __init__(self, parts: Sequence[DocumentStream], draw: WeightedDraw, sources: Sequence[DataSource]) -> None:
        super().__init__(parts, draw, sources)

    def next(self) -> Document | None:
        drawn = self._next()
        if drawn is None:
            return None
        which, document = drawn
        self.draw.add(which, 1)
        return document  # type: ignore[no-any-return]


class SequenceMixture(Mixture):
    """Packed sequences of several sources in proportion to their tokens."""

    def __init__(self, parts: Sequence[Packer], draw: WeightedDraw, sources: Sequence[DataSource]) -> None:
        super().__init__(parts, draw, sources)

    def next(self) -> PackedSequence | None:
        drawn = self._next()
        if drawn is None:
            return None
        which, sequence = drawn
        self.draw.add(which, sequence.num_tokens)
        return sequence  # type: ignore[no-any-return]
