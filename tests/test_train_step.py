"""One optimizer step: its gradient is that of the mean loss over the global batch, however the batch is divided into
micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_models import built, small_model
from torch.nn.functional import cross_entropy

from titan_peer.config.job import Training
from titan_peer.config.optimizer import Optimizer
from titan_peer.distributed.world import World
from titan_peer.optim.optimizers import Optimizers
from titan_peer.train_step import Batch, EndOfDataError, GlobalBatch, Stage, TrainStep, read_global_batch

ALONE = World(0, 1, torch.device("cpu"), None, None)


def batch(rows: int, learnt: int) -> Batch:
    """Sequences of 16 tokens, of which the first `learnt` of each have a label."""
    tokens = torch.randint(50, (rows, 16))
    labels = torch.randint(50, (rows, 16))
    labels[:, learnt:] = -100
    return {"tokens": tokens, "document_ids": torch.zeros_like(tokens), "labels": labels}


@pytest.mark.parametrize("update", ["rowwise", "dense"])
def test_the_gradient_is_that_of_the_mean_over_all_learnt_tokens(update: str) -> None:
    torch.manual_seed(0)
    model = built(small_model(peer__query_norm="none"))
    reference = copy.deepcopy(model)
    micro_batches = [batch(2, 16), batch(1, 3)]
    stages: list[Stage] = []

    @contextmanager
    def noted(stage: Stage) -> Iterator[None]:
        stages.append(stage)
        yield

    optimizers = Optimizers(model, Optimizer(expert_update=update))  # type: ignore[arg-type]
    training = Training(mixed_precision_param="float32", max_norm=0.0)
    called: list[str] = []
    step = TrainStep(model, optimizers, ALONE, training, before_update=lambda: called.append(stages[-1]), stage=noted)
    loss_sum, norm = step(GlobalBatch(micro_batches, 35.0), lr=1e-3)

    whole = {key: torch.cat([part[key] for part in micro_batches]) for key in micro_batches[0]}
    logits = reference(whole["tokens"], whole["document_ids"])
    loss = cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), ignore_index=-100)
    loss.backward()
    expected = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(loss_sum / 35, loss.detach())
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
    assert stages == ["forward", "backward"] * 2 + ["exchange", "update"] and called == ["exchange"]
    assert not torch.equal(model.norm.weight, reference.norm.weight)


def test_batches_without_a_label_are_skipped_and_the_end_of_the_data_is_noticed() -> None:
    batches = iter([batch(1, 0), batch(1, 0), batch(1, 5), batch(1, 2)])
    found = read_global_batch(batches, 2, step=1, sum_over_processes=lambda values: values)
    assert found.learnt_tokens == 7 and len(found.micro_batches) == 2
    padding = {**batch(1, 0), "document_ids": torch.full((1, 16), -1)}
    with pytest.raises(EndOfDataError):
        read_global_batch(iter([padding]), 1, step=2, sum_over_processes=lambda values: values)
