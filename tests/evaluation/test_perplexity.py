"""Perplexity and bits per byte, compared with transformers without packing, masks or our loss."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evaluation_helpers import VALIDATION, titan_peer

from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Data
from titan_peer.evaluation.perplexity import loss_on
from titan_peer.evaluation.suite import held_out_batches
from titan_peer.metrics.held_out_loss import HeldOutLoss

SEQ_LEN = 256
DOCUMENTS = 12


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """(file, texts) of some held-out documents."""
    lines = VALIDATION.read_text(encoding="utf-8").splitlines()[:DOCUMENTS]
    file = tmp_path_factory.mktemp("held_out") / "few.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file, [json.loads(line)["text"] for line in lines]


def pieces(texts, tokenizer):
    """Every part of a document that is in one sequence of the packed stream, and the token after it."""
    stream = []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        stream += [(number, token) for token in [tokenizer.bos_id, *ids, tokenizer.eos_id]]
    for start in range(0, len(stream), SEQ_LEN):
        sequence = stream[start : start + SEQ_LEN + 1]
        for number in sorted({n for n, _ in sequence}):
            tokens = [token for n, token in sequence if n == number]
            if len(tokens) > 1:
                yield tokens


def measured(language_model, file) -> HeldOutLoss:
    source = DataSource(path=str(file))
    batches = held_out_batches(
        source, "--perplexity", language_model.tokenizer, seq_len=SEQ_LEN, batch_size=4, data=Data()
    )
    return loss_on(language_model, batches)


def test_equals_that_of_the_exported_model_in_transformers(language_model, checkpoint, documents, tmp_path):
    """One forward pass of transformers per part of a document, with its own loss."""
    transformers = pytest.importorskip("transformers")
    file, texts = documents
    found = measured(language_model, file)
    titan_peer("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    nll, count = 0.0, 0
    for ids in pieces(texts, language_model.tokenizer):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            nll += exported(input_ids=tokens, labels=tokens).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)
    # the whole text except for that of the first token of each part
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / sum(len(t.encode()) for t in texts), rel=0.02)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary():
    found = HeldOutLoss(loss_sum=50 * math.log(4096), tokens=50, num_bytes=100)
    assert found.perplexity == pytest.approx(4096)
    assert found.bits_per_byte == pytest.approx(6)


def test_a_loss_beyond_floats_is_still_a_number():
    assert math.isfinite(HeldOutLoss(1e9, 1, 1).perplexity)
