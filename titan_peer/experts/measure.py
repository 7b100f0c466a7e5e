"""Which experts a model uses on given text, and the tokens that activate them most."""

from __future__ import annotations

import dataclasses
import heapq
import json
import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from titan_peer.config.data_source import DataSource
from titan_peer.data.sources import Source
from titan_peer.data.streams import Document, DocumentEncoder, DocumentStream
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.experts.usage import DEAD_AFTER, ExpertUsage, LayerUsage, layer_usage
from titan_peer.inference.text_stream import text_in_context
from titan_peer.model import PEER, Transformer, peer_layers

logger = logging.getLogger("titan_peer")

_TOKENS_BEFORE, _TOKENS_AFTER = 12, 5  # of context shown around a token

Batch = tuple[Tensor, Tensor]
"""tokens int64 [B, S] and their documents int64 [B, S]."""


def read_documents(paths: Sequence[str], tokenizer: Tokenizer) -> Iterator[Document]:
    """Every document of the files, once, in their order.

    Raises:
        UserError: a file does not exist or cannot be read.
    """
    encoder = DocumentEncoder(tokenizer)
    sources = [Source(DataSource(path, max_epochs=1), "--data") for path in paths]
    for number, source in enumerate(sources):
        source.divide(1)
        source.require_documents()
        stream = DocumentStream(source, number, encoder, stream=0, num_streams=1, seed=0, shuffle=False, buffer_size=1)
        while (document := stream.next()) is not None:
            yield document


def batches(documents: Iterable[Document], seq_len: int, batch_size: int, limit: int) -> list[Batch]:
    """The first `limit` tokens of the documents in rows of seq_len, `batch_size` rows per batch.

    There is no padding: a last, shorter row is a batch of its own.
    """
    pieces, numbers, found = [], [], 0
    for number, document in enumerate(documents):
        pieces.append(torch.from_numpy(document.tokens).long())
        numbers.append(torch.full_like(pieces[-1], number))
        found += len(pieces[-1])
        if found >= limit:
            break
    tokens, owners = torch.cat(pieces)[:limit], torch.cat(numbers)[:limit]
    whole = len(tokens) // seq_len * seq_len
    rows = [part[:whole].view(-1, seq_len).split(batch_size) for part in (tokens, owners)] if whole else [(), ()]
    work: list[Batch] = list(zip(*rows))
    if whole < len(tokens):
        work.append((tokens[whole:][None], owners[whole:][None]))
    return work


def say_if_short(work: Sequence[Batch], tokens: int) -> None:
    """Log a line where the text had fewer tokens than were asked for."""
    found = sum(batch[0].numel() for batch in work)
    if found < tokens:
        logger.info("the text has %s tokens; --tokens %s were asked for", f"{found:,}", f"{tokens:,}")


@torch.no_grad()
def _run(model: Transformer, work: Sequence[Batch], label: str) -> Iterator[Batch]:
    """Run the model on every batch, showing progress; yields each batch after its forward pass."""
    device = model.tok_embeddings.weight.device
    for tokens, documents in tqdm(work, desc=label, unit="batch", disable=None):
        model(tokens.to(device), documents.to(device))
        yield tokens, documents


def measure(model: Transformer, work: Sequence[Batch], num_hot: int = 10) -> list[LayerUsage]:
    """The usage of every PEER layer on the batches, with the `num_hot` most loaded experts of each."""
    usage = ExpertUsage(model, in_training=False)
    for _ in _run(model, work, "counting experts"):
        pass
    usage.detach()
    return [layer_usage(layer, counts, num_hot=num_hot) for layer, counts in usage.read().items()]


@dataclasses.dataclass(frozen=True, order=True)
class Activation:
    """A token that an expert was retrieved for."""

    gate: float
    """The gate of the head that gave the expert most."""
    head: int
    before: str
    token: str
    after: str


class _TopTokens:
    """Keeps, for chosen experts of a layer, the tokens with the largest gates."""

    def __init__(self, experts: Sequence[int], keep: int) -> None:
        self.experts, self.keep = torch.tensor(experts), keep
        self.heaps: dict[int, list[tuple[float, int, int]]] = {expert: [] for expert in experts}
        """expert -> a heap of (gate, position of the token in the whole text, head)"""
        self.tokens_seen = 0

    def __call__(self, peer: PEER, indices: Tensor, gates: Tensor) -> None:
        found = torch.isin(indices, self.experts.to(indices.device)).nonzero()  # [P, 3]: token, head, rank
        chosen, weights = indices[tuple(found.T)].tolist(), gates[tuple(found.T)].tolist()
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for (token, head, _), expert, gate in zip(found.tolist(), chosen, weights):
            best[expert, token] = max(best.get((expert, token), (0.0, 0)), (gate, head))
        for (expert, token), (gate, head) in best.items():
            heap = self.heaps[expert]
            heapq.heappush(heap, (gate, self.tokens_seen + token, head))
            if len(heap) > self.keep:
                heapq.heappop(heap)
        self.tokens_seen += indices.shape[0]


def top_tokens(
    model: Transformer, work: Sequence[Batch], tokenizer: Tokenizer, chosen: dict[int, list[int]], keep: int
) -> dict[int, dict[int, list[Activation]]]:
    """For the chosen experts of each layer, the tokens whose gates were largest, descending: layer -> expert ->
    tokens."""
    watchers = {}
    layers = dict(peer_layers(model))
    for layer in layers:
        if chosen.get(layer):
            watchers[layer] = _TopTokens(chosen[layer], keep)
            layers[layer].attach("record", watchers[layer])
    for _ in _run(model, work, "finding tokens"):
        pass
    for layer, watcher in watchers.items():
        layers[layer].detach(watcher)
    tokens = torch.cat([batch[0].flatten() for batch in work])
    documents = torch.cat([batch[1].flatten() for batch in work])

    def activation(gate: float, place: int, head: int) -> Activation:
        inside = documents == documents[place]
        first = max(place - _TOKENS_BEFORE, int(inside.nonzero()[0]))
        last = min(place + 1 + _TOKENS_AFTER, int(inside.nonzero()[-1]) + 1)
        around = tokens[first:place].tolist(), int(tokens[place]), tokens[place + 1 : last].tolist()
        return Activation(gate, head, *text_in_context(tokenizer, *around))

    return {
        layer: {e: [activation(*entry) for entry in sorted(heap, reverse=True)] for e, heap in watcher.heaps.items()}
        for layer, watcher in watchers.items()
    }


def tokens_report(found: dict[int, dict[int, list[Activation]]], usage: Sequence[LayerUsage]) -> str:
    """The tokens of each expert as text: each token in brackets, in its context."""
    loads = {(u.layer, hot.expert): hot for u in usage for hot in u.hot}
    lines = []
    for layer, experts in found.items():
        for expert, activations in experts.items():
            hot = loads.get((layer, expert))
            lines.append(f"layer {layer}, expert {expert}" + (f": {hot.load:.1f} x the uniform share" if hot else ""))
            for a in activations:
                before, token, after = (json.dumps(t, ensure_ascii=False)[1:-1] for t in (a.before, a.token, a.after))
                lines.append(f"  {a.gate:.3f} head {a.head}  {before[-50:]:>50}[{token}]{after}")
            if not activations:
                lines.append("  never retrieved")
            lines.append("")
    return "\n".join(lines)


def usage_table(usage: Sequence[LayerUsage]) -> str:
    """The usage as text, one line per layer under a header, and what it cannot tell."""
    header = (
        f"{'layer':>5} {'used':>7} {'unevenness':>10} {'Gini':>6} {'dead':>9}  most loaded experts (x uniform share)"
    )
    lines = [header]
    for u in usage:
        hot = ", ".join(f"{h.expert} ({h.load:.1f})" for h in u.hot[:5])
        w, dead = u.whole, "?" if u.expected < DEAD_AFTER else f"{u.dead:,}"
        lines.append(f"{u.layer:>5} {w.share_used:>7.1%} {w.unevenness:>10.3f} {w.gini:>6.3f} {dead:>9}  {hot}")
    if any(u.expected < DEAD_AFTER for u in usage):
        lines.append(
            f"dead ?: too little text to tell; it takes {DEAD_AFTER:g} uses of an expert if usage were uniform"
        )
    return "\n".join(lines)
