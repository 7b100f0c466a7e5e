"""`titan-peer experts`: which experts a saved model uses on given text, and the tokens that most activate them."""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from titan_peer.checkpoint.choice import WHAT_TO_GIVE, find_checkpoint
from titan_peer.checkpoint.folder import TRAIN_STATE
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.data.sources import Source
from titan_peer.data.streams import Document, DocumentEncoder, DocumentStream
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.experts.plots import draw
from titan_peer.experts.usage import ExpertUsage, LayerUsage, Route, layer_usage, peer_layers
from titan_peer.inference.text_stream import text_in_context
from titan_peer.metrics.sinks import JsonlSink
from titan_peer.model import Transformer

logger = logging.getLogger("titan_peer")

_TOKENS_BEFORE, _TOKENS_AFTER = 12, 5  # of context shown around a token

Batch = tuple[Tensor, Tensor]
"""tokens int64 [B, S] and their documents int64 [B, S]."""


def read_documents(paths: Sequence[str], tokenizer: Tokenizer) -> Iterator[Document]:
    """Every document of the files, once, in their order.

    Raises:
        UserError: a file is not there or cannot be read.
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
    """The first `limit` tokens of the documents in rows of seq_len; no padding: the last row is shorter."""
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
    """Put every batch through the model, showing progress; yields each when it is done."""
    device = model.tok_embeddings.weight.device
    for tokens, documents in tqdm(work, desc=label, unit="batch", disable=None):
        model(tokens.to(device), documents.to(device))
        yield tokens, documents


def measure(model: Transformer, work: Sequence[Batch], num_hot: int = 10) -> list[LayerUsage]:
    """The usage of every PEER layer on the batches, with the `num_hot` most loaded experts of each."""
    usage = ExpertUsage(model, in_training=False)
    for _ in _run(model, work, "counting experts"):
        pass
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
        """expert: (gate, place of the token in all text, head)"""
        self.tokens_seen = 0

    def route(self, original: Route, x: Tensor, is_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
        indices, gates = original(x, is_token)
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
        return indices, gates


def top_tokens(
    model: Transformer, work: Sequence[Batch], tokenizer: Tokenizer, chosen: dict[int, list[int]], keep: int
) -> dict[int, dict[int, list[Activation]]]:
    """For the chosen experts of each layer, the tokens whose gates were largest, descending: layer -> expert -> tokens."""
    watchers = {}
    for layer, peer in peer_layers(model):
        if chosen.get(layer):
            watchers[layer] = _TopTokens(chosen[layer], keep)
            peer.route = partial(watchers[layer].route, peer.route)  # type: ignore[method-assign]
    for _ in _run(model, work, "finding tokens"):
        pass
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
    """The tokens of each expert as text: the token in brackets, in its context."""
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
    header = (
        f"{'layer':>5} {'used':>7} {'unevenness':>10} {'Gini':>6} {'dead':>9}  most loaded experts (x uniform share)"
    )
    lines = [header]
    for u in usage:
        hot = ", ".join(f"{h.expert} ({h.load:.1f})" for h in u.hot[:5])
        w = u.whole
        lines.append(f"{u.layer:>5} {w.share_used:>7.1%} {w.unevenness:>10.3f} {w.gini:>6.3f} {u.dead:>9,}  {hot}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "experts",
        (__doc__ or "").partition(": ")[2].capitalize(),
        "examples:\n"
        "  titan-peer experts --checkpoint outputs/debug_model --data assets/sample_text/validation.jsonl\n"
        "  titan-peer experts --checkpoint outputs/debug_model --data a.txt b.jsonl --experts 17 4242",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=WHAT_TO_GIVE)
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="text: .jsonl, .jsonl.gz, .txt, folders"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="read this many at most (default: %(default)s)")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (default: as the model was trained)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument(
        "--experts", type=int, nargs="+", metavar="N", help="show these (default: each layer's hottest)"
    )
    parser.add_argument(
        "--num_experts", type=int, default=4, help="hottest experts shown a layer (default: %(default)s)"
    )
    parser.add_argument("--num_tokens", type=int, default=8, help="tokens shown an expert (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output_dir",
        default="expert_usage",
        metavar="DIR",
        help="gets expert_usage.jsonl, the plots and tokens.txt (default: %(default)s)",
    )
    return parser


def main(args: Sequence[str]) -> int:
    options = _parser().parse_args(args)
    for name in ("tokens", "batch_size", "num_tokens", "num_experts"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    checkpoint = find_checkpoint(options.checkpoint, "--checkpoint")
    model, job, tokenizer = load_model_for_inference(checkpoint, device=options.device)
    num_experts = job.model.peer.num_experts
    seq_len = job.training.seq_len if options.seq_len is None else options.seq_len
    if not 1 <= seq_len <= job.model.max_seq_len:
        raise UserError(f"--seq_len {seq_len}: must be from 1 to model.max_seq_len = {job.model.max_seq_len}")
    if not list(peer_layers(model)):
        raise UserError(f"--checkpoint {checkpoint}: the model has no PEER layer")
    unknown = [expert for expert in options.experts or [] if not 0 <= expert < num_experts]
    if unknown:
        raise UserError(f"--experts {unknown[0]}: the layers have experts 0 to {num_experts - 1:,}")
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None

    work = batches(read_documents(options.data, tokenizer), seq_len, options.batch_size, options.tokens)
    usage = measure(model, work, max(options.num_experts, 10))
    chosen = {u.layer: options.experts or [hot.expert for hot in u.hot[: options.num_experts]] for u in usage}
    report = tokens_report(top_tokens(model, work, tokenizer, chosen, options.num_tokens), usage)

    step = json.loads((checkpoint / TRAIN_STATE).read_text(encoding="utf-8"))["step"]
    records = JsonlSink(folder / "expert_usage.jsonl", resumed_step=0)
    for layer in usage:
        records.write({"step": step, **dataclasses.asdict(layer)})
    records.close()
    (folder / "tokens.txt").write_text(report, encoding="utf-8")
    plots = draw(folder / "expert_usage.jsonl", folder)
    num_tokens = sum(tokens.numel() for tokens, _ in work)
    say_if_short(work, options.tokens)
    print(f"{num_tokens:,} tokens, {usage[0].expected:.1f} uses of an expert if usage were uniform\n")
    print(usage_table(usage), report, f"written: {folder}/expert_usage.jsonl, tokens.txt, ", sep="\n\n", end="")
    print(", ".join(path.name for path in plots.values()))
    return 0
