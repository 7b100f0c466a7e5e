"""Attributes that are set on a model from outside can be removed, and stay correct when the model is copied, moved or
loaded."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from small_models import built, small_model
from torch import Tensor

from titan_peer.config.job import Optimizer
from titan_peer.experts.balance import add_balance_loss
from titan_peer.experts.usage import ExpertUsage
from titan_peer.model import PEER, Transformer, experts_of, peer_layers
from titan_peer.optim.optimizers import Optimizers

ROWWISE = Optimizer(expert_update="rowwise", lr=1e-2)
TOKENS = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))

# --------------------------------------------------------------------------------------------------------------------
# Route hooks


def loss_and_gradients(model: Transformer) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(TOKENS, labels=TOKENS)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def record(seen: list[Tensor]) -> Callable[[PEER, Tensor, Tensor], None]:
    return lambda peer, indices, gates: seen.append(gates)


@pytest.mark.parametrize("order", list(itertools.permutations(["record", "count", "loss"])))
def test_hooks_attached_and_detached_in_any_order_leave_nothing_behind(order: tuple[str, ...]) -> None:
    model = built(small_model(peer__query_norm="rms"))
    plain = loss_and_gradients(model)
    seen: list[Tensor] = []

    def attach(kind: str) -> Callable[[], object]:
        if kind == "loss":
            return add_balance_loss(model, coeff=500.0, micro_batches=1)
        if kind == "count":
            return ExpertUsage(model).detach
        hook = record(seen)
        for _, peer in peer_layers(model):
            peer.attach("record", hook)
        return lambda: [peer.detach(hook) for _, peer in peer_layers(model)]

    detach = {kind: attach(kind) for kind in order}
    for _, peer in peer_layers(model):
        assert [stage for stage, _ in peer.route_hooks] == ["record", "count", "loss"]
    hooked = loss_and_gradients(model)
    assert torch.equal(hooked[0], plain[0]) and len(seen) == 2
    assert not all(torch.equal(a, b) for a, b in zip(hooked, plain))  # the balance loss has a gradient
    for kind in reversed(order) if order[0] == "count" else order:
        detach[kind]()
    assert not any(peer.route_hooks for _, peer in peer_layers(model))
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model), plain)) and len(seen) == 2
    with pytest.raises(ValueError, match="not attached"):
        detach["count"]()


def test_one_of_several_hooks_can_be_taken_off() -> None:
    model = built(small_model())
    first, second = ExpertUsage(model), ExpertUsage(model)
    model(TOKENS)
    first.detach()
    model(TOKENS)
    once, twice = first.read(), second.read()
    assert all(2 * once[layer].counts.sum() == twice[layer].counts.sum() > 0 for layer in once)


# --------------------------------------------------------------------------------------------------------------------
# Expert tables whose gradients are row-wise


def step(model: Transformer, optimizers: Optimizers) -> None:
    (model(TOKENS, labels=TOKENS) / TOKENS.numel()).backward()
    optimizers.clip_and_step(1.0)


def tables(model: Transformer) -> list[Tensor]:
    return [table.detach().clone() for experts in experts_of(model) for table in experts.parameters()]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def deep_copy(model: Transformer) -> Transformer:
    return copy.deepcopy(model)


def pickled(model: Transformer) -> Transformer:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [deep_copy, pickled])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_copy_of_a_model_trains_by_itself(copied: Callable[[Transformer], Transformer], compute_dtype: str) -> None:
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer(expert_compute_dtype=compute_dtype))  # type: ignore[arg-type]
    step(model, optimizers)
    other = copied(model)
    before = tables(model)
    assert equal(tables(other), before)

    plain = torch.optim.AdamW(other.parameters())
    other(TOKENS, labels=TOKENS).backward()
    assert all(table.grad is not None for experts in experts_of(other) for table in experts.parameters())
    plain.step()
    assert not equal(tables(other), before)
    assert equal(tables(model), before) and all(c.is_empty for c in optimizers.collectors)

    plain.zero_grad(set_to_none=True)
    changed = tables(other)
    own = Optimizers(other, ROWWISE)
    step(other, own)
    assert not equal(tables(other), changed) and equal(tables(model), before)
    step(model, optimizers)  # and the original continues
    assert not equal(tables(model), before)


def test_a_model_moved_to_another_dtype_goes_on_training() -> None:
    model = built(small_model())
    optimizers = Optimizers(model, ROWWISE)
    step(model, optimizers)
    for experts in experts_of(model):
        experts.to(torch.bfloat16)
    before = tables(model)
    step(model, optimizers)
    assert before[0].dtype == torch.bfloat16 and not equal(tables(model), before)


def test_moving_tables_does_not_part_them_from_their_collector() -> None:
    model, moved = built(small_model()), built(small_model())
    optimizers, of_moved = Optimizers(model, ROWWISE), Optimizers(moved, ROWWISE)
    for experts in experts_of(moved):
        experts.double().float()  # other memory, the same values
    step(model, optimizers)
    step(moved, of_moved)
    assert equal(tables(moved), tables(model))


def test_tables_that_were_assigned_are_an_error_that_names_the_cause() -> None:
    model, other = built(small_model()), built(small_model(), seed=2)
    optimizers = Optimizers(model, ROWWISE)
    model.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(..., assign=True\)"):
        step(model, optimizers)
    before = tables(model)
    step(model, Optimizers(model, ROWWISE))
    assert not equal(tables(model), before)
    copied_into = built(small_model())
    optimizers = Optimizers(copied_into, ROWWISE)
    copied_into.load_state_dict(other.state_dict())
    step(copied_into, optimizers)


def test_the_first_of_two_optimizers_of_a_model_says_that_it_changes_nothing() -> None:
    model = built(small_model())
    first, second = Optimizers(model, ROWWISE), Optimizers(model, ROWWISE)
    with pytest.raises(RuntimeError, match="a second optimizer for the same model"):
        step(model, first)
    step(model, second)


def test_loaded_weights_are_what_is_computed_with_also_where_there_are_copies() -> None:
    settings = Optimizer(expert_update="rowwise", expert_compute_dtype="bfloat16")
    model, other = built(small_model()), built(small_model(), seed=1)
    for one in (model, other):
        Optimizers(one, settings)
    before = model(TOKENS, labels=TOKENS)
    model.load_state_dict(other.state_dict())
    after = model(TOKENS, labels=TOKENS)
    assert torch.equal(after, other(TOKENS, labels=TOKENS)) and not torch.equal(after, before)
    torch.save(model, io.BytesIO())
