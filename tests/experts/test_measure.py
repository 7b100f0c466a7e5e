"""The text on which expert usage is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.experts import measure

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "assets/sample_text/validation.jsonl")


def test_rows_hold_the_first_tokens_of_the_documents_without_padding() -> None:
    tokenizer = load_tokenizer(str(ROOT / "assets/tokenizer"))
    first = next(measure.read_documents([TEXT], tokenizer)).tokens
    work = measure.batches(measure.read_documents([TEXT], tokenizer), seq_len=64, batch_size=3, limit=1000)
    assert [tuple(tokens.shape) for tokens, _ in work] == [(3, 64)] * 5 + [(1, 40)]
    joined = torch.cat([tokens.flatten() for tokens, _ in work]).numpy()
    np.testing.assert_array_equal(joined[: min(len(first), 1000)], first[:1000])
    documents = torch.cat([numbers.flatten() for _, numbers in work])
    starts = [0, *(1 + i for i in range(999) if documents[i + 1] != documents[i])]
    assert all(joined[i] == tokenizer.bos_id for i in starts)
