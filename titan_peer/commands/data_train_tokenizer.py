"""`titan-peer data train-tokenizer`: train a byte-level BPE tokenizer on a source's text."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_peer.common.command_line import parse_options
from titan_peer.common.errors import Problems, UserError
from titan_peer.config.data_source import DataSource

_SMALLEST_VOCABULARY = 256 + 2  # every byte, and the begin and the end token


@dataclass
class TrainTokenizerOptions:
    """Train a byte-level BPE tokenizer; write it as tokenizer.json, which a job reads with model.tokenizer_path.

    Example:
      titan-peer data train-tokenizer --source.path assets/sample_text/train.jsonl --vocab_size 4096 --output
      outputs/bpe
    """

    output: str
    """Folder for tokenizer.json."""
    vocab_size: int
    """Entries, including the two special tokens and the 256 bytes."""
    source: DataSource = field(default_factory=lambda: DataSource(""))
    """The text; weight and epochs have no effect here."""
    max_documents: int = 0
    """Use only this many documents, from the first on; 0: all."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_options(
        TrainTokenizerOptions, args, "data train-tokenizer", inspect.getdoc(TrainTokenizerOptions) or ""
    )
    problems, size = Problems(), options.vocab_size
    problems.add_if(not options.source.path, "--source.path: must be given; it names the text to train on")
    problems.add_if(size < _SMALLEST_VOCABULARY, f"--vocab_size {size}: must be at least {_SMALLEST_VOCABULARY}")
    problems.refuse()

    from titan_peer.data.sources import open_source
    from titan_peer.data.train_tokenizer import texts_of, train_tokenizer

    source = open_source(options.source, "--source")
    tokenizer = train_tokenizer(itertools.islice(texts_of(source), options.max_documents or None), options.vocab_size)
    found = tokenizer.get_vocab_size()
    file = Path(options.output) / "tokenizer.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")  # an existing tokenizer.json stays intact until then
        tokenizer.save(str(partial))
        partial.replace(file)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written: {error.strerror or error}") from None
    note = "" if found == options.vocab_size else f", not {options.vocab_size:,}: the text has no more pairs to merge"
    print(f"{file}: {found:,} entries{note}")
    return 0
