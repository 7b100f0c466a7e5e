"""`titan-peer data tokenize`: tokenise a source once, into memory-mapped shards that any later job reads as a source."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titan_peer.command_line import parse_options
from titan_peer.data.records import BadDocument, TokenizedText
from titan_peer.data.sources import Source, open_sources
from titan_peer.data.streams import DocumentEncoder
from titan_peer.data.tokenized import MANIFEST, dtype_for, is_tokenized, read_manifest, write_shard
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer
from titan_peer.data_source import DataSource
from titan_peer.errors import UserError

logger = logging.getLogger("titan_peer")

_TEXTS_AT_A_TIME, _CHARACTERS_AT_A_TIME = 512, 2**22


@dataclass
class TokenizeOptions:
    """Tokenise a source into memory-mapped shards, which a job reads with data.sources.0.path = the output folder.

    The same command again goes on after the last whole shard. Begin and end tokens are not stored; the job adds them.

    Example:
      titan-peer data tokenize --source.path assets/sample_text/train.jsonl --output outputs/tokens
    """

    output: str
    """Folder for the shards."""
    source: DataSource = field(default_factory=lambda: DataSource(""))
    """What to tokenise; weight and epochs have no meaning here."""
    tokenizer_path: str = "assets/tokenizer"
    """As model.tokenizer_path of a job."""
    tokens_per_shard: int = 100_000_000
    """A shard is closed when it has as many; until then its tokens are held in memory, 4 bytes each."""


def documents_from(source: Source, chunk: int, record: int) -> Iterator[tuple[int, int, Any]]:
    """(chunk, record, document) from a place on, in the order of the files."""
    for c in range(chunk, source.num_chunks):
        first = record if c == chunk else 0
        for i, document in enumerate(source.records(c, first), first):
            yield c, i, document


class Tokenization:
    """The shards of one output folder, as far as they have been made."""

    def __init__(self, options: TokenizeOptions, source: Source, tokenizer: Tokenizer) -> None:
        self.options, self.source, self.tokenizer = options, source, tokenizer
        self.folder = Path(options.output)
        self.manifest: dict[str, Any] = {
            "format": 1,
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_path": options.tokenizer_path,
            "dtype": dtype_for(tokenizer.vocab_size),
            "source": {"path": options.source.path, "fingerprint": source.fingerprint()},
            "shards": [],
            "next": {"chunk": 0, "record": 0},
            "skipped": 0,
            "complete": False,
        }
        if is_tokenized(options.output):
            self._resume()

    def _resume(self) -> None:
        found = read_manifest(self.folder)
        for what, key in (
            ("another tokenizer", "tokenizer"),
            ("another source, or one that has changed,", "source"),
            ("numbers too small for the tokenizer's ids", "dtype"),
        ):
            if found[key] != self.manifest[key]:
                raise UserError(f"--output {self.folder}: holds what was made with {what}; give a new folder")
        self.manifest = found
        if not found["complete"]:
            logger.info("going on after %d whole shards", len(found["shards"]))

    def run(self) -> None:
        """Make the shards that are missing."""
        if self.manifest["complete"]:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        place, skipped = self.manifest["next"], self.manifest["skipped"]
        encoder = DocumentEncoder(self.tokenizer)
        shard: list[TokenizedText] = []
        texts: list[str] = []
        characters = 0
        with tqdm(
            total=self.source.num_chunks,
            initial=place["chunk"],
            unit="chunk",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        ) as bar:
            for chunk, record, document in documents_from(self.source, place["chunk"], place["record"]):
                bar.update(chunk - bar.n)
                if isinstance(document, BadDocument):
                    if self.options.source.on_bad_document == "error":
                        raise self.source.refusal(document)
                    skipped += 1
                    continue
                if isinstance(document, TokenizedText):
                    raise UserError(f"--source.path {self.options.source.path}: is tokenised already")
                texts.append(document)
                characters += len(document)
                if len(texts) < _TEXTS_AT_A_TIME and characters < _CHARACTERS_AT_A_TIME:
                    continue
                shard += encoder.encode_texts(texts)
                texts, characters = [], 0
                if sum(len(d.ids) for d in shard) >= self.options.tokens_per_shard:
                    self._close(shard, {"chunk": chunk, "record": record + 1}, skipped)
                    shard = []
            bar.update(self.source.num_chunks - bar.n)
        if texts:
            shard += encoder.encode_texts(texts)
        if shard:
            self._close(shard, {"chunk": self.source.num_chunks, "record": 0}, skipped)
        self.manifest["complete"] = True
        self._write_manifest()

    def _close(self, shard: list[TokenizedText], following: dict[str, int], skipped: int) -> None:
        """Write a shard, then say in the manifest that it is there."""
        name = f"shard-{len(self.manifest['shards']):05}"
        entry = write_shard(self.folder, name, shard, self.manifest["dtype"])
        self.manifest["shards"].append(entry)
        self.manifest["next"], self.manifest["skipped"] = following, skipped
        self._write_manifest()
        logger.info("%s: %s documents, %s tokens", name, f"{entry['documents']:,}", f"{entry['tokens']:,}")

    def _write_manifest(self) -> None:
        partial = self.folder / f"{MANIFEST}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self.manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / MANIFEST)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_options(TokenizeOptions, args, "data tokenize", inspect.getdoc(TokenizeOptions) or "")
    if not options.source.path:
        raise UserError("--source.path: must be given: what is to be tokenised")
    if options.tokens_per_shard < 1:
        raise UserError(f"--tokens_per_shard {options.tokens_per_shard}: must be at least 1")
    tokenizer = load_tokenizer(options.tokenizer_path)
    (source,), _ = open_sources([options.source], "source", num_streams=1)
    tokenization = Tokenization(options, source, tokenizer)
    try:
        tokenization.run()
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written: {error.strerror or error}") from None
    shards, skipped = tokenization.manifest["shards"], tokenization.manifest["skipped"]
    documents, tokens = sum(s["documents"] for s in shards), sum(s["tokens"] for s in shards)
    print(f"{options.output}: {documents:,} documents, {tokens:,} tokens in {len(shards)} shards, {skipped:,} left out")
    return 0
