"""Padding has no effect: gradients, statistics and counts from padded documents equal those of the same documents
without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from small_models import built, small_model
from torch import Tensor

from titan_peer.data.packing import PackedSequence, PackingFormat, Piece
from titan_peer.data.streams import Document
from titan_peer.experts.balance import add_balance_loss, unevenness
from titan_peer.experts.usage import ExpertUsage
from titan_peer.model import QueryBatchNorm, Transformer
from titan_peer.ops import backends
from titan_peer.optim.rowwise import collect_row_gradients

LENGTHS = (9, 1, 14, 5)
Batch = tuple[Tensor, Tensor, Tensor]
"""tokens, document ids, labels"""


@pytest.fixture
def choose_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def choose(name: str) -> None:
        monkeypatch.setenv("TITAN_PEER_BACKEND", name)
        backends._choose.cache_clear()

    yield choose
    backends._choose.cache_clear()


def documents() -> list[Piece]:
    random = np.random.default_rng(0)
    made = [Document(random.integers(0, 50, n).astype(np.int32), 0, 0, n) for n in LENGTHS]
    return [Piece(document, 0, len(document.tokens)) for document in made]


def stacked(sequences: list[PackedSequence]) -> Batch:
    fields = ("tokens", "document_ids", "labels")
    tokens, ids, labels = (torch.from_numpy(np.stack([getattr(s, f) for s in sequences])).long() for f in fields)
    return tokens, ids, labels


def padded(pad_token: int = 3) -> Batch:
    """One document per sequence of 16, as packing = "pad" makes them."""
    return stacked([PackingFormat(16, 1, pad_token).sequence([piece]) for piece in documents()])


def without_padding() -> Batch:
    return stacked([PackingFormat(sum(LENGTHS), 1, pad_token=0).sequence(documents())])


def learnt_from(batch: Batch, *, compiled: bool, share_experts: bool = False) -> dict[str, Tensor]:
    """All effects of one micro-batch: gradients, running statistics, counts, touched rows."""
    model = built(small_model(peer__share_experts=share_experts))
    add_balance_loss(model, coeff=0.5, micro_batches=1)
    usage = ExpertUsage(model)
    experts = [model.shared_experts] if share_experts else [block.peer.experts for block in model.layers[1:]]
    collectors = collect_row_gradients(experts)
    if compiled:
        torch._dynamo.reset()
        for block in model.layers:
            block.compile(fullgraph=True, backend="aot_eager")
    loss = model(*batch)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers())
    for layer, counts in usage.read().items():
        found |= {
            f"counts {layer}": counts.counts,
            f"gate sums {layer}": counts.gate_sums,
            f"idle {layer}": counts.idle,
        }
    for i, collector in enumerate(collectors):
        found |= dict(zip((f"rows {i}", f"down {i}", f"up {i}"), collector.materialize()))
    return found


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_padded_documents_teach_what_they_teach_without_padding(
    backend: str, choose_backend: Callable[[str], None]
) -> None:
    choose_backend(backend)
    require_same(learnt_from(padded(), compiled=False), learnt_from(without_padding(), compiled=False))


def test_padding_teaches_nothing_through_compiled_blocks_and_shared_tables() -> None:
    expected = learnt_from(without_padding(), compiled=False, share_experts=True)
    require_same(learnt_from(padded(), compiled=True, share_experts=True), expected)


def test_what_stands_in_the_padding_changes_no_bit() -> None:
    some, other = (learnt_from(padded(token), compiled=False) for token in (3, 44))
    assert some.keys() == other.keys()
    assert all(torch.equal(some[name], other[name]) for name in some)


def test_a_micro_batch_of_padding_alone_changes_nothing_and_the_next_one_trains() -> None:
    model = built(small_model())
    add_balance_loss(model, coeff=0.5, micro_batches=1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    empty = stacked([PackingFormat(16, 1, pad_token=3).empty()] * 2)
    loss = model(*empty)
    loss.backward()
    assert loss == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    model(*padded()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_batch_norm_of_no_token_at_all_keeps_its_statistics() -> None:
    norm = QueryBatchNorm(2, 4)
    norm.reset_parameters()
    assert norm(torch.zeros(0, 2, 4)).shape == (0, 2, 4)
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()


def replicas_norm(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, QueryBatchNorm]:
    """Batch norm over replicas with (queries, is_token) each, one after the other in this process."""
    moments: list[Tensor] = []

    def remember(own: Tensor) -> Tensor:
        moments.append(own)
        return own[None]

    norm = QueryBatchNorm(2, 4)
    for part in parts:
        norm.reset_parameters()
        norm.gather_from_replicas = remember
        norm(*part)
    everyone = torch.stack(moments)
    outputs = []
    for part in parts:
        norm.reset_parameters()
        norm.gather_from_replicas = lambda own: everyone
        outputs.append(norm(*part))
    return torch.cat(outputs), norm


def test_batch_norm_weighs_replicas_by_their_tokens() -> None:
    torch.manual_seed(0)
    queries = torch.randn(30, 2, 4) * torch.linspace(0.5, 3, 30)[:, None, None] + torch.arange(30)[:, None, None]
    is_token = torch.rand(30) < 0.6
    cuts = [17, 0, 5, 8]
    is_token[17:22] = False  # one replica has only padding, another one has nothing
    outputs, norm = replicas_norm(list(zip(queries.split(cuts), is_token.split(cuts))))
    real = queries[is_token].double()
    mean, var = real.mean(0), real.var(0, unbiased=False)
    torch.testing.assert_close(outputs[is_token].double(), (real - mean) / (var + 1e-5).sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * var, rtol=1e-5, atol=1e-5)


def test_unevenness_leaves_out_places_of_negative_index() -> None:
    torch.manual_seed(0)
    indices, gates = torch.randint(0, 9, (20,)), torch.rand(20, dtype=torch.float64)
    mixed = torch.cat([indices, torch.full((7,), -1)])
    more = torch.cat([gates, torch.rand(7, dtype=torch.float64)]).requires_grad_()
    assert unevenness(mixed, more, 9).item() == pytest.approx(unevenness(indices, gates, 9).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(unevenness(mixed, more, 9), more)
    assert gradient[:20].all() and not gradient[20:].any()
    (gradient,) = torch.autograd.grad(unevenness(torch.full((7,), -1), more[20:], 9), more)
    assert not gradient.any()


def test_a_model_asked_for_logits_takes_padding_too() -> None:
    model: Transformer = built(small_model()).eval()
    tokens, ids, _ = padded()
    with torch.no_grad():
        logits = model(tokens, ids)
        alone = model(tokens[:1, : LENGTHS[0]])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1, : LENGTHS[0]], alone, rtol=1e-5, atol=1e-6)
