"""The moving average of the weights equals the sum that defines it, whichever rows the steps have used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import built, small_model
from torch import Tensor

from titan_peer.config.optimizer import Optimizer
from titan_peer.model import Transformer, experts_of
from titan_peer.optim.optimizers import Optimizers

DECAY = 0.8


def train(optimizers: Optimizers, step: int) -> None:
    """One step on very few tokens, so that most experts are used in few steps."""
    torch.manual_seed(step)
    tokens = torch.randint(50, (1, 3))
    optimizers.model(tokens, labels=tokens.roll(1)).backward()
    optimizers.set_learning_rate(0.01)
    optimizers.clip_and_step(1.0)


def brute_force(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(1 - b) / (1 - b^t) sum b^(t-i) w_i in float64, from the weights after each update."""
    t = len(seen)
    shares = [DECAY ** (t - i) * (1 - DECAY) / (1 - DECAY**t) for i in range(1, t + 1)]
    return {name: sum(share * w[name].double() for share, w in zip(shares, seen)) for name in seen[0]}  # type: ignore[misc]


def trained(update: str, after_step: Callable[[Optimizers, int], None], steps: int = 12) -> list[dict[str, Tensor]]:
    """What the weights were after each step."""
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer(expert_update=update, expert_catch_up=False))  # type: ignore[arg-type]
    optimizers.average_weights(DECAY)
    seen = []
    for step in range(steps):
        train(optimizers, step)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        after_step(optimizers, step)
    return seen


@pytest.mark.parametrize("update", ["rowwise", "dense"])
@pytest.mark.parametrize("read_at", [set(), {0, 4, 5}], ids=["read at the end", "read in between"])
def test_the_average_is_the_weighted_sum_of_all_weights(update: str, read_at: set[int]) -> None:
    last: dict[str, Tensor] = {}

    def read(optimizers: Optimizers, step: int) -> None:
        if step in read_at or step == 11:
            assert optimizers.average is not None
            last.update(optimizers.average.named_tensors())

    seen = trained(update, read)
    expected = brute_force(seen)
    assert last.keys() == expected.keys() and any("running_var" in name for name in last)
    for name, average in last.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
    table = "layers.1.peer.experts.expert_up"
    changes = torch.stack([(b[table] != a[table]).any(2).any(1) for a, b in zip(seen, seen[1:])]).sum(0)
    assert update == "dense" or (changes.min() == 0 and 0 < changes.float().mean() < 6)


def test_rows_that_a_step_does_not_use_are_neither_read_nor_written() -> None:
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer())
    optimizers.average_weights(DECAY)
    assert optimizers.average is not None
    train(optimizers, 0)
    experts = experts_of(model)[0]
    state = optimizers.average.state_of(experts.expert_up)
    unused = (state["row_updates"] == 0).nonzero()[:, 0]
    before = optimizers.average.named_tensors()["layers.1.peer.experts.expert_up"].clone()
    with torch.no_grad():
        state["average"].fill_(torch.nan)
    torch.manual_seed(1)
    tokens = torch.randint(50, (1, 3))
    model(tokens, labels=tokens.roll(1)).backward()
    used = optimizers.collectors[0].sorted().row_ids.long()
    with torch.no_grad():
        state["average"][used] = before[used]
    optimizers.clip_and_step(1.0)
    assert 0 < len(used) < 64 and len(unused)
    assert state["average"].isnan().any(2).any(1).sum() == 64 - len(used)


def test_inside_the_model_has_the_averages_and_afterwards_its_weights_to_the_last_bit() -> None:
    model = built(small_model())
    optimizers = Optimizers(model, Optimizer(expert_compute_dtype="bfloat16"))
    optimizers.average_weights(DECAY)
    assert optimizers.average is not None
    for step in range(3):
        train(optimizers, step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in optimizers.average.named_tensors().items()}
    with optimizers.averaged_weights():
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        computed_with = experts_of(model)[0].tables()[0].clone()
    assert all(torch.equal(inside[name], averages[name]) for name in before)
    assert torch.equal(computed_with, averages["layers.1.peer.experts.expert_down"].bfloat16())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in optimizers.average.named_tensors().items())
    assert torch.equal(experts_of(model)[0].tables()[0], before["layers.1.peer.experts.expert_down"].bfloat16())


def test_a_row_that_is_overwritten_with_its_state_has_the_average_of_its_source() -> None:
    """As dead experts become copies of used ones: `Optimizers.state_of` has what must be copied too."""
    copied: list[tuple[int, int]] = []

    def copy(optimizers: Optimizers, step: int) -> None:
        if step != 5:
            return
        table = experts_of(optimizers.model)[0].expert_down
        state = optimizers.state_of(table)
        rows = state["row_updates"].argsort()
        source, target = int(rows[20]), int(rows[0])
        copied.append((source, target))
        with torch.no_grad():
            for tensor in (table, *(t for t in state.values() if t.ndim > 0)):
                tensor[target] = tensor[source]

    averages: list[dict[str, Tensor]] = []

    def copy_and_read(optimizers: Optimizers, step: int) -> None:
        copy(optimizers, step)
        if step == 6 and optimizers.average is not None:
            averages.append(optimizers.average.named_tensors())

    seen = trained("rowwise", copy_and_read, steps=7)
    (source, target), name = copied[0], "layers.1.peer.experts.expert_down"
    for weights in seen[:6]:  # as if the target had been the source all along
        weights[name][target] = weights[name][source]
    torch.testing.assert_close(averages[0][name][target].double(), brute_force(seen)[name][target])


def test_a_new_average_forgets_the_old_one() -> None:
    model: Transformer = built(small_model())
    optimizers = Optimizers(model, Optimizer())
    optimizers.average_weights(DECAY)
    assert optimizers.average is not None
    train(optimizers, 0)
    optimizers.average.start_anew()
    train(optimizers, 1)
    for name, average in optimizers.average.named_tensors().items():
        assert torch.equal(average, model.state_dict()[name]), name
