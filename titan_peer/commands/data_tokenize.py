"""`titan-peer data tokenize`: tokenise a source once, into memory-mapped shards that any later job reads as a
source."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

from titan_peer.common.command_line import parse_options
from titan_peer.common.errors import Problems, os_failure
from titan_peer.config.data_source import DataSource


@dataclass
class TokenizeOptions:
    """Tokenise a source into memory-mapped shards, which a job reads with data.sources.0.path = the output folder.

    After an interruption, the same command continues after the last complete shard. Begin and end tokens are not
    stored; the job adds them.

    Example:
      titan-peer data tokenize --source.path assets/sample_text/train.jsonl --output outputs/tokens
    """

    output: str
    """Folder for the shards."""
    source: DataSource = field(default_factory=lambda: DataSource(""))
    """What to tokenise; weight and epochs have no effect here."""
    tokenizer_path: str = "assets/tokenizer"
    """As model.tokenizer_path of a job."""
    tokens_per_shard: int = 100_000_000
    """A shard is written when it has this many tokens; until then they are held in memory, 4 bytes each."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_options(TokenizeOptions, args, "data tokenize", inspect.getdoc(TokenizeOptions) or "")
    problems = Problems()
    problems.add_if(not options.source.path, "--source.path: must be given; it names the text to tokenise")
    shard = options.tokens_per_shard
    problems.add_if(shard < 1, f"--tokens_per_shard {shard}: must be at least 1")
    problems.refuse()

    from titan_peer.data.pretokenize import tokenize
    from titan_peer.data.sources import open_source
    from titan_peer.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer_path)
    source = open_source(options.source, "--source")
    try:
        manifest = tokenize(
            options.output,
            source,
            tokenizer,
            tokenizer_path=options.tokenizer_path,
            tokens_per_shard=options.tokens_per_shard,
        )
    except OSError as error:
        raise os_failure(f"--output {options.output}: cannot be written", error) from None
    shards, skipped = manifest["shards"], manifest["skipped"]
    documents, tokens = sum(s["documents"] for s in shards), sum(s["tokens"] for s in shards)
    print(f"{options.output}: {documents:,} documents, {tokens:,} tokens in {len(shards)} shards, {skipped:,} left out")
    return 0
