"""Small real corpora in several formats, and helpers of the data tests."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Data
from titan_peer.data.loader import TrainingLoader, build_dataloader
from titan_peer.data.pipeline import Batch
from titan_peer.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE = ROOT / "assets/sample_text/train.jsonl"
TOKENIZER = str(ROOT / "assets/tokenizer")


def sample_texts(start: int = 0, stop: int | None = None) -> list[str]:
    with SAMPLE.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file][start:stop]


def write_jsonl(path: Path, texts: Sequence[str], opener: Callable[..., Any] = open) -> Path:
    with opener(path, "wt") as file:
        for text in texts:
            print(json.dumps({"text": text}), file=file)
    return path


def write_parquet(path: Path, texts: Sequence[str], row_group_size: int = 100) -> Path:
    pq.write_table(pa.table({"text": list(texts), "number": range(len(texts))}), path, row_group_size=row_group_size)
    return path


def three_sources(folder: Path) -> list[DataSource]:
    """JSONL, gzip in two files, and Parquet, of unequal weights and lengths."""
    write_jsonl(folder / "a.jsonl", sample_texts(0, 700))
    (folder / "b").mkdir()
    write_jsonl(folder / "b/0.jsonl.gz", sample_texts(700, 900), gzip.open)
    write_jsonl(folder / "b/1.jsonl.gz", sample_texts(900, 1300), gzip.open)
    write_parquet(folder / "c.parquet", sample_texts(1300, 1900))
    return [
        DataSource(str(folder / "a.jsonl"), name="a", weight=0.6),
        DataSource(str(folder / "b"), name="b", weight=0.3),
        DataSource(str(folder / "c.parquet"), name="c", weight=0.1),
    ]


def tokenizer_with_a_gap(folder: Path, largest_id: int) -> Path:
    """The bundled tokenizer, with a far larger id for its last entry " giving" (4,095)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((Path(TOKENIZER) / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["\u0120giving"] = largest_id
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def make_loader(
    sources: list[DataSource],
    *,
    rank: int = 0,
    world: int = 1,
    seq_len: int = 64,
    global_batch_size: int = 8,
    local_batch_size: int | None = None,
    tokenizer: str = TOKENIZER,
    seed: int = 1,
    **data: Any,
) -> TrainingLoader:
    return build_dataloader(
        data=Data(sources=sources, **data),
        tokenizer=load_tokenizer(tokenizer),
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size or global_batch_size // world,
        dp_rank=rank,
        dp_world_size=world,
        seed=seed,
    )


def digests(batch: Batch) -> list[str]:
    """A digest of each sequence of a batch, over all its tensors."""
    rows = zip(*(batch[key].numpy() for key in ("tokens", "labels", "document_ids")))
    return [hashlib.sha256(b"".join(part.tobytes() for part in row)).hexdigest()[:16] for row in rows]


def take(loader: TrainingLoader, batches: int) -> list[str]:
    return [digest for _ in range(batches) for digest in digests(next(loader))]
