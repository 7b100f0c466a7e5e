"""The keys of one [[data.sources]] table, which describes a source of documents. `titan_peer.data.sources` opens it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from titan_peer.common.bounds import Range, out_of_range


@dataclass
class DataSource:
    """A set of documents."""

    path: str
    """A file, a folder or a glob pattern of .jsonl, .jsonl.gz, .jsonl.zst (also .json...), .parquet and .txt files (a
    .txt file is one document), a folder made by `titan-peer data tokenize`, or the id of a Hugging Face dataset."""
    name: str = ""
    """Its name in reports and checkpoints; the path if empty."""
    subset: str = ""
    """Hugging Face: the dataset's configuration."""
    split: str = "train"
    """Hugging Face: the split."""
    streaming: bool = True
    """Hugging Face: read over the network during training; false downloads the split first."""
    text_key: str = "text"
    """The key or column that holds the document."""
    template: str = ""
    """A Jinja template that builds the document from all columns, instead of text_key: "{{ title }}\\n{{ text }}"."""
    weight: Annotated[float, Range(0)] = 1.0
    """Its share of the mix, relative to the weights of the other sources (data.mix_by says of what)."""
    max_epochs: Annotated[int, Range(0)] = 0
    """Passes over the source, each in a new order; 0: no limit."""
    at_end: Literal["drop", "stop"] = "drop"
    """After max_epochs: drop continues with the other sources, stop ends the job."""
    on_bad_document: Literal["error", "skip"] = "error"
    """What to do about broken JSON, a missing key, wrong encoding, an empty or too large document, or a damaged file:
    stop and say where it is, or skip and count it."""
    max_document_bytes: Annotated[int, Range(1)] = 32 * 2**20
    """Size above which a document counts as bad."""


def source_name(source: DataSource) -> str:
    return source.name or source.path


def source_problems(key: str, sources: Sequence[DataSource]) -> list[str]:
    """What is impossible in a list of sources that a job has under `key`, a line each."""
    found: list[str] = []
    for i, source in enumerate(sources):
        found += out_of_range(source, f"{key}[{i}].")
        for name, ok, allowed in (
            ("path", bool(source.path), "must not be empty"),
            ("at_end", source.at_end == "drop" or source.max_epochs > 0, "needs max_epochs of at least 1"),
        ):
            if not ok:
                found.append(f"{key}[{i}].{name} = {getattr(source, name)!r}: {allowed}")
    if sources and not any(source.weight > 0 for source in sources):
        found.append(f"{key}: all weights are 0; at least one must be positive")
    return found
