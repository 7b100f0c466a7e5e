"""Tokenising a source once, into memory-mapped shards that any later job reads as a source."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titan_peer.common.errors import UserError
from titan_peer.common.folder_lock import FolderLock
from titan_peer.data.identity import another_reading
from titan_peer.data.records import BadDocument, TokenizedText
from titan_peer.data.sources import Source
from titan_peer.data.streams import DocumentEncoder
from titan_peer.data.tokenized import MANIFEST, dtype_for, is_tokenized, read_manifest, write_shard
from titan_peer.data.tokenizer import Tokenizer

logger = logging.getLogger("titan_peer")

_TEXTS_AT_A_TIME, _CHARACTERS_AT_A_TIME = 512, 2**22


def documents_from(source: Source, chunk: int, record: int) -> Iterator[tuple[int, int, Any]]:
    """(chunk, record, document) of every document from a place on, in the order of the files."""
    for c in range(chunk, source.num_chunks):
        first = record if c == chunk else 0
        for i, document in enumerate(source.records(c, first), first):
            yield c, i, document


class Tokenization:
    """The shards of one output folder that have been made so far.

    Args:
        output: the folder; unfinished shards of the same source and tokenizer in it are continued.
        source, tokenizer: what is tokenised, and with what.
        tokenizer_path: how the user named the tokenizer; kept in the manifest.
        tokens_per_shard: a shard is closed when it has as many tokens.
    Raises:
        UserError: the folder holds the tokens of something else.
    """

    def __init__(
        self, output: str, source: Source, tokenizer: Tokenizer, *, tokenizer_path: str, tokens_per_shard: int
    ) -> None:
        self.source, self.tokenizer, self.tokens_per_shard = source, tokenizer, tokens_per_shard
        self.folder = Path(output)
        self.manifest: dict[str, Any] = {
            "format": 1,
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_path": tokenizer_path,
            "dtype": dtype_for(tokenizer.vocab_size),
            "source": {"path": source.config.path, "fingerprint": source.fingerprint(), **source.identity},
            "shards": [],
            "next": {"chunk": 0, "record": 0},
            "skipped": 0,
            "complete": False,
        }
        if is_tokenized(output):
            self._resume()

    def _resume(self) -> None:
        found = read_manifest(self.folder)
        for what, key in (
            ("another tokenizer", "tokenizer"),
            ("numbers too small for the tokenizer's ids", "dtype"),
        ):
            if found[key] != self.manifest[key]:
                raise self._refusal(f"shards made with {what}")
        self._require_same_source(found)
        self.manifest = found
        if not found["complete"]:
            logger.info("continuing after %d complete shards", len(found["shards"]))

    def _require_same_source(self, found: dict[str, Any]) -> None:
        then, now = found["source"], self.manifest["source"]
        # versions that did not store the content identified a source by its path
        same = [key for key in ("fingerprint", "content" if "content" in then else "path") if then[key] == now[key]]
        if len(same) < 2:
            raise self._refusal("shards made with another source, or with one that has changed since")
        if "reading" not in then:
            logger.warning(
                "%s was made by a version that did not store how the files were read (text_key, template, "
                "max_document_bytes); assuming that it was as now",
                self.folder,
            )
            return
        if then["modified"] < now["modified"]:
            logger.warning(
                "%s: a file of the source was written to after the shards were made, but its size and the parts of it that "
                "are compared have not changed",
                self.folder,
            )
        key = another_reading(then["reading"], now["reading"])
        strict = (then["reading"].get("on_bad_document"), now["reading"].get("on_bad_document")) == ("skip", "error")
        if key is None and strict and found["skipped"]:
            key = "on_bad_document"
        if key is not None:
            said = f"{then['reading'].get(key, 'another key')!r}, not {now['reading'].get(key)!r}"
            raise self._refusal(f"shards made with source.{key} = {said}")

    def _refusal(self, what: str) -> UserError:
        return UserError(f"--output {self.folder}: holds {what}; give a new folder")

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
                    if self.source.config.on_bad_document == "error":
                        raise self.source.refusal(document)
                    skipped += 1
                    continue
                if isinstance(document, TokenizedText):
                    raise UserError(f"--source.path {self.source.config.path}: is already tokenised")
                texts.append(document)
                characters += len(document)
                if len(texts) < _TEXTS_AT_A_TIME and characters < _CHARACTERS_AT_A_TIME:
                    continue
                shard += encoder.encode_texts(texts)
                texts, characters = [], 0
                if sum(len(d.ids) for d in shard) >= self.tokens_per_shard:
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
        """Write a shard, then list it in the manifest."""
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


def tokenize(
    output: str, source: Source, tokenizer: Tokenizer, *, tokenizer_path: str, tokens_per_shard: int
) -> dict[str, Any]:
    """Make the shards that are missing in a folder, as `Tokenization` does; returns the manifest.

    Raises:
        UserError: another process is writing to the folder, or it holds the tokens of something else.
        UserError, TransientError, OSError: the folder cannot be written to.
    """
    is_complete = is_tokenized(output) and read_manifest(Path(output))["complete"]  # then nothing is written
    lock = None if is_complete else FolderLock(Path(output), 0, "--output")
    try:
        tokenization = Tokenization(
            output, source, tokenizer, tokenizer_path=tokenizer_path, tokens_per_shard=tokens_per_shard
        )
        tokenization.run()
        return tokenization.manifest
    finally:
        if lock is not None:
            lock.release()
