"""Weighted mixes of sources.

By tokens (what people mean by a mix): each source is packed into sequences of its own, and sequences are drawn so that each
source's part of the tokens is its weight. Drawing documents and packing them afterwards would let the shares drift with
the documents' lengths. By documents: documents are drawn, so that each source's part of the documents is its weight, and
packed together.

The draw is always the source that is farthest behind its weight, so shares are off by at most one draw a stream at any
time; a seeded head start for each source and stream keeps the streams from drawing the same source at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from titan_peer.data.packing import PackedSequence, Packer
from titan_peer.data.streams import Document, DocumentStream, State


class WeightedDraw:
    """Which of several named things comes next, so that amounts stay in proportion to weights.

    Args:
        head_start: for each, an amount it is taken to be behind at the beginning.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], head_start: Sequence[float]) -> None:
        self.names, self.weights, self.head_start = list(names), list(weights), list(head_start)
        self.amounts = [0.0] * len(names)
        self.active = [weight > 0 for weight in weights]

    def draw(self) -> int | None:
        """The active one that is farthest behind its part; None when none is active."""
        active = [i for i, is_active in enumerate(self.active) if is_active]
        if not active:
            return None
        total = sum(self.amounts[i] for i in active) / sum(self.weights[i] for i in active)
        return max(active, key=lambda i: self.weights[i] * total - self.amounts[i] + self.head_start[i])

    def add(self, which: int, amount: float) -> None:
        self.amounts[which] += amount

    def drop(self, which: int) -> None:
        """Go on without one; the others keep their proportions from here on."""
        self.active[which] = False
        self.amounts = [0.0] * len(self.names)
        self.head_start = [0.0] * len(self.names)

    def state_dict(self) -> State:
        return {
            name: {
                "amount": self.amounts[i],
                "head_start": self.head_start[i],
                "active": self.active[i],
                "weight": self.weights[i],
            }
            for i, name in enumerate(self.names)
        }

    def load_state_dict(self, state: State) -> None:
        """Go on; with other sources or weights than at the save, the count of shares begins anew."""
        same = {name: entry["weight"] for name, entry in state.items()} == dict(zip(self.names, self.weights))
        for i, name in enumerate(self.names):
            if name in state:
                self.active[i] = state[name]["active"] and self.weights[i] > 0
                if same:
                    self.amounts[i], self.head_start[i] = state[name]["amount"], state[name]["head_start"]


class Part(Protocol):
    """What is mixed: DocumentStreams or Packers."""

    def next(self) -> Any: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Mixture:
    """Draws from parts; ends when all have, or, for a part that is in `stops`, when that one has."""

    def __init__(self, parts: Sequence[Part], draw: WeightedDraw, stops: Sequence[bool]) -> None:
        self.parts, self.draw, self.stops = parts, draw, stops
        self._stopped = False

    def _next(self) -> tuple[int, Any] | None:
        while not self._stopped and (which := self.draw.draw()) is not None:
            item = self.parts[which].next()
            if item is not None:
                return which, item
            self.draw.drop(which)
            self._stopped = self.stops[which]
        return None

    def state_dict(self) -> State:
        parts = {name: part.state_dict() for name, part in zip(self.draw.names, self.parts)}
        return {"draw": self.draw.state_dict(), "parts": parts, "stopped": self._stopped}

    def load_state_dict(self, state: State) -> None:
        """Go on with the sources of the same names; one that is new begins at its beginning."""
        self.draw.load_state_dict(state["draw"])
        self._stopped = state["stopped"]
        for name, part in zip(self.draw.names, self.parts):
            if name in state["parts"]:
                part.load_state_dict(state["parts"][name])


class DocumentMixture(Mixture):
    """Documents of several sources in proportion to their numbers."""

    def __init__(self, parts: Sequence[DocumentStream], draw: WeightedDraw, stops: Sequence[bool]) -> None:
        super().__init__(parts, draw, stops)

    def next(self) -> Document | None:
        drawn = self._next()
        if drawn is None:
            return None
        which, document = drawn
        self.draw.add(which, 1)
        return document  # type: ignore[no-any-return]


class SequenceMixture(Mixture):
    """Packed sequences of several sources in proportion to their tokens."""

    def __init__(self, parts: Sequence[Packer], draw: WeightedDraw, stops: Sequence[bool]) -> None:
        super().__init__(parts, draw, stops)

    def next(self) -> PackedSequence | None:
        drawn = self._next()
        if drawn is None:
            return None
        which, sequence = drawn
        self.draw.add(which, sequence.num_tokens)
        return sequence  # type: ignore[no-any-return]
