"""`titan-peer data inspect`: shows what a job would be trained on, before it starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import Problems, UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config

_EXAMPLE = """\
Any key of the job may also be given, as for run_train.sh.

example:
  titan-peer data inspect --job.config_file train_configs/debug_model.toml --sequences 2 --output outputs/inspect
"""


def _parser() -> CommandParser:
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
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options, job = _parser().parse_known_args(args)
    problems = Problems()
    for name in ("sequences", "batches", "documents"):
        problems.add_if(getattr(options, name) < 0, f"--{name} {getattr(options, name)}: must not be negative")
    with problems.collected():
        config = load_config(job)
    problems.refuse()
    return _inspect(options, config)


def _inspect(options: argparse.Namespace, config: JobConfig) -> int:
    from tqdm import tqdm

    from titan_peer.data.loader import build_dataloader
    from titan_peer.data.report import describe, document_lengths, lengths_table, plot_lengths, shares_table
    from titan_peer.data.special_tokens import describe as describe_borders
    from titan_peer.data.tokenizer import load_tokenizer

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
