"""Details of a step against what follows from the weights and gradients themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from processes import train_jobs
from small_jobs import SMALL, trainer
from small_models import built, small_model

from titan_peer.metrics.callback import Callback, Step
from titan_peer.metrics.details import largest_logits
from titan_peer.optim.groups import group_of_each
from titan_peer.trainer import Trainer

TWO_STEPS = ["--training.steps", 2, "--metrics.detail_freq", 2, "--checkpoint.enable", "false"]
TWO_STEPS += ["--lr_scheduler.warmup_steps", 1, "--lr_scheduler.decay_ratio", 0]


def read(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The step's record and the record of its details."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (details,) = [record for record in records if "grad_norm/head" in record]
    (step,) = [record for record in records if record["step"] == details["step"] == 2 and "loss" in record]
    return step, details


@pytest.mark.parametrize("update", ["rowwise", "dense"])
def test_details_are_those_of_weights_and_gradients(update: str, tmp_path: Path) -> None:
    job = trainer(tmp_path, *TWO_STEPS, "--optimizer.expert_update", update)
    weights: list[dict[str, torch.Tensor]] = []
    job.callbacks.insert(0, Remember(job, weights))
    job.train()
    step, details = read(tmp_path)
    norms = {name: value for name, value in details.items() if name.startswith("grad_norm/")}
    assert len(norms) == 6
    # torch.linalg.vector_norm on a CPU adds up float32 squares one by one: for a million normal numbers 3.4e-5 too low
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(step["grad_norm"], rel=1e-4)
    before, after = weights
    groups = group_of_each(job.model)
    for group in set(groups.values()):
        names = [name for name, parameter in job.model.named_parameters() if groups[parameter] == group]
        changed = {name: after[name] - before[name] for name in names}
        used: dict[str, torch.Tensor] = {name: torch.ones(len(after[name])).bool() for name in names}
        if group == "expert_tables" and update == "rowwise":  # the rows that the step used, in either table
            for module in {name.rpartition(".")[0] for name in names}:
                tables = [f"{module}.expert_down", f"{module}.expert_up"]
                used |= dict.fromkeys(
                    tables, torch.stack([changed[name].ne(0).any(-1).any(-1) for name in tables]).any(0)
                )
        moved = math.sqrt(sum(difference.square().sum() for difference in changed.values()))
        weight = math.sqrt(sum(after[name][used[name]].square().sum() for name in names))
        assert details[f"weight_norm/{group}"] == pytest.approx(weight, rel=1e-5), group
        assert details[f"update_ratio/{group}"] == pytest.approx(moved / weight, rel=1e-4), group
        assert moved > 0


class Remember(Callback):
    """Keeps the weights before and after step 2."""

    def __init__(self, job: Trainer, kept: list[dict[str, torch.Tensor]]) -> None:
        self.job, self.kept = job, kept

    def before_update(self, step: int) -> None:
        if step == 2:
            self.keep()

    def after_update(self, step: Step) -> None:
        if step.number == 2:
            self.keep()

    def keep(self) -> None:
        self.kept.append({name: p.detach().clone() for name, p in self.job.model.named_parameters()})


def test_largest_logits_are_those_of_attention_as_it_is_defined() -> None:
    model = built(small_model()).double()
    model.layers[1].attention.wkv_b.weight.data *= 7
    tokens, documents = torch.randint(50, (1, 12)), torch.tensor([[0] * 5 + [1] * 7])
    inputs: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.layers):
        block.attention_norm.register_forward_hook(lambda _m, _i, out, layer=layer: inputs.update({layer: out}))
    found = largest_logits(model, tokens, documents)
    assert model.training and set(found) == set(inputs) == set(range(len(model.layers)))
    positions = [*range(5), *range(7)]
    for layer, x in inputs.items():
        mla, largest = model.layers[layer].attention, -math.inf
        rope = model.rope[positions][None]
        queries = torch.cat(mla.queries(x, rope), -1)[0]
        keys = mla.expand(*mla.latents(x, rope))[0][0]
        for i in range(12):
            for j in range(i + 1):
                if documents[0, i] == documents[0, j]:
                    logits = (queries[i] * keys[j]).sum(-1) * mla.softmax_scale
                    largest = max(largest, logits.max().item())
        assert found[layer] == pytest.approx(largest, rel=1e-5)


def test_two_processes_report_the_details_of_one(tmp_path: Path) -> None:
    batch = ["--training.global_batch_size", 2, "--optimizer.lr", 1e-4]
    small = [*SMALL, *TWO_STEPS, *batch]
    trainer(tmp_path / "one", *TWO_STEPS, *batch).train()
    plan = ["--training.local_batch_size", 1, "--parallelism.expert_parallel_degree", 2]
    train_jobs(2, [[*small, *plan, "--job.dump_folder", tmp_path / "two"]])
    one, two = read(tmp_path / "one")[1], read(tmp_path / "two")[1]
    assert set(one) == set(two)
    for name, value in one.items():
        # one process measures logits on its first sequence, two on one each
        assert two[name] >= value * 0.999 if "logit" in name else two[name] == pytest.approx(value, rel=2e-3), name
