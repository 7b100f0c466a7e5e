"""Learning-rate schedule, parameter groups, clipping over dense and row-wise gradients together."""

from __future__ import annotations

import copy

import pytest
import torch
from test_model import built, small_model

from titan_peer.config import LRScheduler, Optimizer
from titan_peer.optimizer import Optimizers, learning_rate_factor


def test_warmup_stable_decay() -> None:
    config = LRScheduler(warmup_steps=10, decay_ratio=0.4, decay_type="linear", min_lr_factor=0.1)
    factors = [learning_rate_factor(step, 100, config) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1) and factors[9:60] == [1.0] * 51
    assert factors[79] == pytest.approx(0.55) and factors[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[59:], factors[60:]))


@pytest.mark.parametrize(("decay_type", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_decay_shapes_at_half_way_and_at_the_end(decay_type: str, half: float) -> None:
    config = LRScheduler(warmup_steps=0, decay_ratio=1.0, decay_type=decay_type)  # type: ignore[arg-type]
    assert learning_rate_factor(50, 100, config) == pytest.approx(half)
    assert learning_rate_factor(100, 100, config) == pytest.approx(0)


def test_weight_decay_spares_norms_gains_and_expert_tables() -> None:
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer(expert_update="dense", weight_decay=0.3, expert_lr_factor=2.0))
    decay = {id(p): g["weight_decay"] for g in optimizers.adamw.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        spared = "norm" in name or "expert_" in name
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name
    optimizers.set_learning_rate(0.5)
    (tables,) = [
        g
        for g in optimizers.adamw.param_groups
        if any(p is model.layers[1].peer.experts.expert_up for p in g["params"])
    ]
    assert tables["lr"] == 1.0


@pytest.mark.parametrize("max_norm", [0.0, 0.01])
def test_rowwise_and_dense_take_the_same_first_step_and_report_the_same_norm(max_norm: float) -> None:
    dense_model = built(small_model())
    row_model = copy.deepcopy(dense_model)
    tokens = torch.randint(50, (2, 16))
    norms = []
    for model, update in ((dense_model, "dense"), (row_model, "rowwise")):
        optimizers = Optimizers(model, Optimizer(expert_update=update, lr=1e-2))  # type: ignore[arg-type]
        for half in tokens:  # two micro-batches
            (model(half[None], labels=half[None]) / 32).backward()
        norms.append(optimizers.clip_and_step(max_norm))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-6)
    for (name, dense), row in zip(dense_model.named_parameters(), row_model.parameters()):
        torch.testing.assert_close(row, dense, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
