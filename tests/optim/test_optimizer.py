"""Learning-rate schedule, parameter groups, clipping over dense and row-wise gradients together."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import built, small_model

from titan_peer.config.optimizer import OPTIMIZERS, LRScheduler, Muon, Optimizer, ParameterGroup
from titan_peer.optim.groups import group_of_each
from titan_peer.optim.optimizers import Optimizers
from titan_peer.optim.schedule import learning_rate_factor, schedule_cuts, schedule_phases


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


@pytest.mark.parametrize("decay_ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("decay_type", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 100])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_the_first_step_learns_however_short_the_job(steps, warmup_steps, decay_type, decay_ratio) -> None:
    config = LRScheduler(warmup_steps=warmup_steps, decay_ratio=decay_ratio, decay_type=decay_type)
    assert learning_rate_factor(1, steps, config) > 0
    assert sum(schedule_phases(steps, config)) == steps


@pytest.mark.parametrize(
    ("steps", "warmup_steps", "decay_ratio", "phases", "said"),
    [
        (100, 20, 0.5, (20, 30, 50), ""),
        (100, 50, 0.5, (50, 0, 50), ""),
        (20, 100, 0.5, (20, 0, 0), "lr_scheduler.warmup_steps = 100 is more than training.steps = 20"),
        (100, 80, 0.5, (80, 0, 20), "leaves 20 of training.steps = 100 to the decay"),
        (100, 100, 0.5, (100, 0, 0), "leaves 0 of training.steps = 100 to the decay"),
    ],
)
def test_a_schedule_that_does_not_fit_is_cut_and_said(steps, warmup_steps, decay_ratio, phases, said) -> None:
    config = LRScheduler(warmup_steps=warmup_steps, decay_ratio=decay_ratio)
    assert schedule_phases(steps, config) == phases
    cuts = schedule_cuts(steps, config)
    assert said in "".join(cuts) and bool(cuts) == bool(said)


def test_weight_decay_spares_norms_gains_and_expert_tables() -> None:
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer(expert_update="dense", weight_decay=0.3, expert_lr_factor=2.0))
    (adamw,) = optimizers.dense
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        spared = "norm" in name or "expert_" in name
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name
    optimizers.set_learning_rate(0.5)
    (tables,) = [g for g in adamw.param_groups if any(p is model.layers[1].peer.experts.expert_up for p in g["params"])]
    assert tables["lr"] == 1.0


def test_every_parameter_is_in_the_group_that_its_module_says() -> None:
    class NormalisedProjection(torch.nn.Linear):
        pass

    model = built(small_model())
    model.layers[0].attention.add_module("norm_like", NormalisedProjection(4, 4, bias=False))
    model.layers[0].add_module("affine", torch.nn.LayerNorm((2, 3)))
    names: dict[str, set[str]] = {}
    of_each = group_of_each(model)
    for name, parameter in model.named_parameters():
        names.setdefault(of_each[parameter], set()).add(name.removeprefix("layers."))
    assert names["embeddings"] == {"tok_embeddings.weight"} and names["head"] == {"output.weight"}
    assert all("sub_keys" in name for name in names["sub_keys"]) and names["sub_keys"]
    assert all("experts.expert_" in name for name in names["expert_tables"]) and names["expert_tables"]
    assert all("norm." in name or "affine" in name for name in names["gains"])
    assert {"0.affine.weight", "0.affine.bias", "1.peer.query_norm.weight", "1.peer.query_norm.bias"} <= names["gains"]
    assert {"0.attention.norm_like.weight", "0.feed_forward.w2.weight", "1.peer.wq.weight"} <= names["matrices"]


def test_groups_have_their_own_rates_betas_and_decay() -> None:
    settings = Optimizer(
        beta1=0.8,
        weight_decay=0.2,
        head=ParameterGroup(lr_factor=0.5, end_lr_factor=0.1, beta1=0.7, beta2=0.6, weight_decay=0.0),
        expert_tables=ParameterGroup(lr_factor=4.0, end_lr_factor=1.0, beta2=0.5, weight_decay=0.0),
    )
    optimizers = Optimizers(built(small_model()), settings)
    optimizers.set_learning_rate(0.1, done=0.5)
    groups = {group["name"]: group for optimizer in optimizers.all for group in optimizer.param_groups}
    head, tables, matrices = groups["head"], groups["expert_tables"], groups["matrices"]
    assert head["lr"] == pytest.approx(0.03) and head["betas"] == (0.7, 0.6) and head["weight_decay"] == 0.0
    assert tables["lr"] == pytest.approx(0.25) and tables["betas"] == (0.8, 0.5) and tables["weight_decay"] == 0.0
    assert matrices["lr"] == 0.1 and matrices["betas"] == (0.8, 0.95) and matrices["weight_decay"] == 0.2


def test_an_earlier_name_is_the_tables_rate_unless_both_are_given() -> None:
    assert Optimizer(expert_lr_factor=2.0, expert_weight_decay=0.3).group("expert_tables") == ParameterGroup(
        lr_factor=2.0, beta1=0.9, beta2=0.95, weight_decay=0.3
    )
    both = Optimizer(expert_lr_factor=2.0, expert_tables=ParameterGroup(lr_factor=3.0, weight_decay=0.0))
    (problem,) = both.problems()
    assert "optimizer.expert_lr_factor = 2.0" in problem and "optimizer.expert_tables.lr_factor = 3.0" in problem


def test_settings_of_muon_that_have_no_effect_are_refused() -> None:
    (problem,) = Optimizer(muon=Muon(momentum=0.9)).problems()
    assert problem == 'optimizer.muon: needs optimizer.name = "muon"'
    (problem,) = Optimizer(name="muon", matrices=ParameterGroup(beta1=0.9)).problems()
    assert "optimizer.matrices.beta1 = 0.9" in problem and "optimizer.muon.momentum" in problem


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_there_before_the_first_step(name: str) -> None:
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer(name=name))
    before = {key: tensor.shape for key, tensor in optimizers.named_state()}
    tokens = torch.randint(50, (2, 16))
    (model(tokens, labels=tokens) / 32).backward()
    optimizers.clip_and_step(1.0)
    assert {key: tensor.shape for key, tensor in optimizers.named_state()} == before


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


def test_bfloat16_copies_of_the_tables_are_computed_with_and_follow_the_updates() -> None:
    model = built(small_model(n_layers=2))
    optimizers = Optimizers(model, Optimizer(expert_compute_dtype="bfloat16", lr=1e-2))
    experts = model.layers[1].peer.experts
    before = experts.expert_up.detach().clone()
    for step in range(3):
        tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(step))
        (model(tokens, labels=tokens) / 32).backward()
        optimizers.clip_and_step(1.0)
        assert experts.expert_up.dtype == torch.float32
        for table, copy_ in zip((experts.expert_down, experts.expert_up), experts.plan.compute_copies):
            assert torch.equal(copy_, table.detach().bfloat16())
    touched = (experts.expert_up != before).any(-1).any(-1)
    assert 0 < touched.sum() < len(touched)
    plain = copy.deepcopy(model)  # without the optimizer's copies of the tables
    tokens = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(9))
    rounded, exact = model(tokens, labels=tokens), plain(tokens, labels=tokens)
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)
    with torch.no_grad():
        experts.expert_up.zero_()
    optimizers.refresh_copies()
    assert not experts.plan.compute_copies[1].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert_update": "dense", "expert_catch_up": False}, "dense allows only true"),
        ({"beta1": 0.98}, "beta1 must be below the root of beta2"),
        (
            {"expert_weight_decay": 2.0, "lr": 0.5},
            "optimizer.expert_tables.weight_decay = 2.0: times its learning rate, up to 0.5",
        ),
        ({"expert_update": "dense", "expert_optimizer": "normalized"}, 'dense allows only "adamw"'),
        ({"expert_update": "dense", "expert_momentum": 0.5}, 'needs optimizer.expert_update = "rowwise"'),
    ],
)
def test_settings_under_which_missed_steps_cannot_be_made_good_are_named(settings: dict, words: str) -> None:
    assert words in "\n".join(Optimizer(**settings).problems())
    if "expert_update" not in settings:
        assert not Optimizer(**settings, expert_catch_up=False).problems()
    assert not Optimizer(expert_update="dense").problems()


def test_a_table_learns_of_its_missed_steps_only_with_catch_up() -> None:
    """A row that is used in the first and the third of three steps: the two ways differ in it by what the second step
    would have done under dense AdamW."""
    model = built(small_model())
    states = []
    for catch_up in (False, True):
        copy_ = copy.deepcopy(model)
        optimizers = Optimizers(copy_, Optimizer(lr=1e-2, eps=1e-30, expert_catch_up=catch_up))
        experts = copy_.layers[1].peer.experts
        collector, draw = experts.plan.row_gradients, torch.Generator().manual_seed(0)
        for used in (5, 6, 5):
            E, D = experts.expert_down.shape[1:]
            dz, x = torch.randn(1, 1, E, generator=draw), torch.randn(1, D, generator=draw)
            collector.record(torch.tensor([[used]]), dz, dz, x, x)
            optimizers.clip_and_step(0.0)
        states.append((experts.expert_down.detach(), optimizers.state_of(experts.expert_down)))
    (without, plain), (with_, state) = states
    assert "last_use" not in plain and state["last_use"][[5, 6]].tolist() == [3, 2] and state["last_use"].sum() == 5
    assert torch.equal(without[6], with_[6]) and not torch.equal(without[5], with_[5])


def test_settings_of_the_other_row_wise_optimizer_are_named() -> None:
    found = Optimizer(expert_optimizer="normalized", expert_second_moment="row", beta1=0.99).problems()
    words = 'optimizer.expert_second_moment = row: needs optimizer.expert_optimizer = "adamw"; normalized allows only "element"'
    assert found == [words]  # beta1 is of dense parameters only
    (found,) = Optimizer(expert_momentum=0.5).problems()
    assert (
        found
        == 'optimizer.expert_momentum = 0.5: needs optimizer.expert_optimizer = "normalized"; adamw allows only 0.9'
    )


@pytest.mark.parametrize(
    ("settings", "per_weight", "per_row"),
    [
        ({}, 8, 4),
        ({"expert_catch_up": False}, 8, 0),
        ({"expert_optimizer": "normalized"}, 4, 4),
        ({"expert_optimizer": "normalized", "expert_moment_dtype": "bfloat16"}, 2, 4),
        ({"expert_optimizer": "normalized", "expert_momentum": 0.0}, 0, 0),
        ({"expert_optimizer": "normalized", "expert_momentum": 0.0, "expert_weight_decay": 0.1}, 0, 4),
    ],
)
def test_bytes_of_the_state_of_expert_tables(settings: dict, per_weight: int, per_row: int) -> None:
    config = Optimizer(**settings)
    assert not config.problems()
    model = built(small_model())
    optimizers = Optimizers(model, config)
    tables = {p for experts in optimizers.experts for p in experts.parameters()}
    found = sum(
        state.nbytes for table in tables for name, state in optimizers.state_of(table).items() if name != "step"
    )
    assert found == sum(per_weight * table.numel() + per_row * len(table) for table in tables)


def test_normalized_updates_move_each_used_expert_by_one_size() -> None:
    model = built(small_model())
    before = copy.deepcopy(model)
    optimizers = Optimizers(model, Optimizer(expert_optimizer="normalized", lr=1e-2))
    tokens = torch.randint(50, (2, 16))
    (model(tokens, labels=tokens) / 32).backward()
    optimizers.clip_and_step(1.0)
    for old, new in zip(before.layers[1].peer.experts.parameters(), model.layers[1].peer.experts.parameters()):
        moved = (new - old).square().mean((1, 2)).sqrt()
        used = moved > 0
        assert 0 < used.sum() < len(used)
        torch.testing.assert_close(moved[used], torch.full_like(moved[used], 0.2 * 1e-2), rtol=1e-2, atol=0)
