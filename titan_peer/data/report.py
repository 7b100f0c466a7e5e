"""What a job would be trained on: sequences as text, each source's share, the lengths of documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from titan_peer.data.loader import TrainingLoader
from titan_peer.data.pipeline import Batch
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.ops.cross_entropy import IGNORE_INDEX


def describe(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The lines that show sequence `row` of a batch."""
    tokens, labels, documents = (batch[key][row].tolist() for key in ("tokens", "labels", "document_ids"))
    padding = sum(document < 0 for document in documents)
    real = zip(tokens[: len(tokens) - padding], documents)
    parts = [[t for t, _ in group] for _, group in groupby(real, key=lambda pair: pair[1])]
    learnt = sum(label != IGNORE_INDEX for label in labels)
    yield f"sequence {row}: {len(tokens)} tokens, {learnt} learnt, {len(parts)} documents, {padding} padding"
    for number, part in enumerate(parts):
        begins = " begins" if part[0] == tokenizer.bos_id else " continues" if number == 0 else ""
        ends = ", ends" if part[-1] == tokenizer.eos_id else ""
        yield f"--- document {number}{begins}{ends}, {len(part)} tokens"
        yield tokenizer.decode(part)
    yield "---"


def document_lengths(loader: TrainingLoader, limit: int) -> dict[str, list[int]]:
    """Tokens of the first `limit` documents of each source, in the order of training."""
    lengths: dict[str, list[int]] = {source.name: [] for source in loader.pipeline.sources}
    bar = tqdm(total=limit * len(lengths), unit="document", desc="measuring", disable=not sys.stderr.isatty())
    for stream in map(loader.pipeline.stream, range(loader.pipeline.num_streams)):
        for source, documents in zip(loader.pipeline.sources, stream.documents):
            for _ in range(-(-limit // loader.pipeline.num_streams)):
                document = documents.next()
                if document is None or document.epoch > 0 or len(lengths[source.name]) == limit:
                    break
                lengths[source.name].append(len(document.tokens))
                bar.update()
    bar.close()
    return lengths


def lengths_table(lengths: dict[str, list[int]], seq_len: int) -> Iterator[str]:
    """One line per source: how many tokens its documents have, and which part of them does not fit into a sequence."""
    width = max(6, *map(len, lengths))
    yield f"{'source':<{width}}  {'documents':>9}  {'median':>9}  {'90 %':>9}  {'longest':>9}  longer than {seq_len:,}"
    for name, values in lengths.items():
        if values:
            median, most = (round(float(np.percentile(values, part))) for part in (50, 90))
            longer = sum(value > seq_len for value in values) / len(values)
            yield f"{name:<{width}}  {len(values):>9,}  {median:>9,}  {most:>9,}  {max(values):>9,}  {longer:.1%}"


def plot_lengths(lengths: dict[str, list[int]], seq_len: int, output: Path) -> None:
    """Histogram of tokens per document, one line per source, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {name: values for name, values in lengths.items() if values}
    longest = max((max(values) for values in measured.values()), default=1)
    bins = np.unique(np.geomspace(1, longest + 1, 60).round()).tolist()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, values in measured.items():
        label = f"{name}: median {np.median(values):,.0f}, {len(values):,} documents"
        axes.hist(
            values, bins=bins, weights=np.full(len(values), 100 / len(values)), histtype="step", label=label, lw=1.5
        )
    axes.axvline(seq_len, color="0.4", linestyle=":", label=f"training.seq_len = {seq_len:,}")
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents (%)", title="Length of documents by source")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def shares_table(loader: TrainingLoader) -> Iterator[str]:
    """One line per source: the share that was asked for and the share it had."""
    sources, statistics = loader.pipeline.sources, loader.statistics()
    total = sum(source.config.weight for source in sources)
    width = max(6, *(len(source.name) for source in sources))
    yield f"{'source':<{width}}  {'weight':>7}  {'share':>7}  {'tokens':>13}  {'epoch':>5}  {'left out':>8}  chunks"
    for source in sources:
        tokens, share, epoch, skipped = (
            statistics[f"data/{source.name}_{what}"] for what in ("tokens", "share", "epoch", "skipped")
        )
        yield (
            f"{source.name:<{width}}  {source.config.weight / total:>7.2%}  {share:>7.2%}  {tokens:>13,}  {epoch:>5}  "
            f"{skipped:>8,}  {source.num_chunks:,}"
        )
