"""`titan-peer data inspect`: shows what a job would be trained on, before it starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config
from titan_peer.data.loader import TrainingLoader, build_dataloader
from titan_peer.data.pipeline import Batch
from titan_peer.data.special_tokens import describe as describe_borders
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer
from titan_peer.ops.cross_entropy import IGNORE_INDEX

_EXAMPLE = """\
Any key of the job may be given as well, as for run_train.sh.

example:
  titan-peer data inspect --job.config_file train_configs/debug_model.toml --sequences 2 --output outputs/inspect
"""


def parse(args: Sequence[str]) -> tuple[argparse.Namespace, JobConfig]:
    parser = CommandParser(
        "data inspect",
        "Show a job's data: decoded sequences with document borders, each source's share, and the lengths of its "
        "documents.",
        _EXAMPLE,
    )
    parser.add_argument("--sequences", type=int, default=2, help="sequences to show (default: 2)")
    parser.add_argument("--batches", type=int, default=20, help="global batches to count shares over (default: 20)")
    parser.add_argument(
        "--documents", type=int, default=2000, help="documents of each source to measure (default: 2000)"
    )
    parser.add_argument(
        "--output", default="", help="folder for document_lengths.png, a histogram (default: not written)"
    )
    options, job = parser.parse_known_args(args)
    for name in ("sequences", "batches", "documents"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: must not be negative")
    return options, load_config(job)


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
    """One line per source: its documents' lengths in tokens, and the share of them that does not fit a sequence."""
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
    """One line per source: the share that was asked for and the actual one."""
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


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options, config = parse(args)
    tokenizer, training = load_tokenizer(config.model.tokenizer_path), config.training
    batch_size = training.local_batch_size if training.global_batch_size == -1 else training.global_batch_size
    loader = build_dataloader(
        data=config.data,
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        global_batch_size=batch_size,
        local_batch_size=batch_size,
        dp_rank=0,
        dp_world_size=1,
        seed=config.debug.seed,
    )
    print(f"{config.model.tokenizer_path}: {describe_borders(tokenizer.specials, config.data)}\n")
    shown = 0
    for _ in tqdm(range(max(options.batches, 1)), unit="batch", desc="reading", disable=not sys.stderr.isatty()):
        batch = next(loader)
        for row in range(min(options.sequences - shown, batch_size)):
            print("\n".join(describe(batch, row, tokenizer)))
            shown += 1
    print(f"\n{loader.pipeline.num_streams} streams, packing {config.data.packing}, {max(options.batches, 1)} batches:")
    print("\n".join(shares_table(loader)))
    lengths = document_lengths(loader, options.documents)
    print("\n" + "\n".join(lengths_table(lengths, training.seq_len)))
    if not options.output:
        return 0
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_lengths(lengths, training.seq_len, folder / "document_lengths.png")
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror or error}") from None
    print(f"\n{folder / 'document_lengths.png'}")
    return 0
