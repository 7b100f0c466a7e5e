"""One optimizer step over a global batch: the training loop runs it, and the dry run traces it.

How gradients are scaled: the loss of a step is the mean over the learnt tokens of the global batch, whichever process
and micro-batch has them,

    loss = sum over processes, micro-batches and tokens of -log p(label) / learnt tokens of the global batch

A process back-propagates its own part of this sum. So the gradient of the loss is the plain sum over processes, and
everything that brings gradients together sums: FSDP's reduce-scatter, which would divide by the number of processes
unless it were told not to (`distributed/parallelize.py`), and the exchange of the expert tables' gradients
(`distributed/expert_parallel.py` and `row_exchange.py`). No gradient is scaled anywhere else, except by clipping.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from titan_peer.common.errors import UserError
from titan_peer.config.job import Training
from titan_peer.distributed.collectives import on_all_processes
from titan_peer.distributed.parallelize import autocast, compute_dtype
from titan_peer.distributed.world import World
from titan_peer.model import QueryBatchNorm, Transformer
from titan_peer.ops.cross_entropy import IGNORE_INDEX
from titan_peer.optim.optimizers import Optimizers

logger = logging.getLogger("titan_peer")

MAX_EMPTY_BATCHES = 1000  # in a row, with no token to learn from

Batch = dict[str, Tensor]
"""`tokens`, `document_ids` and `labels`, each int64 [B, S]."""
Stage = Literal["forward", "backward", "exchange", "update"]


class EndOfDataError(Exception):
    """The sources have ended (data.sources[i].max_epochs) before training.steps."""


@dataclass(frozen=True)
class StepResult:
    """What a step says about itself, the same on every process."""

    loss: float
    """Nats per learnt token, mean over the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    stop: bool
    """Whether any process has been told to stop."""
    skipped: str = ""
    """Why the step has changed nothing; empty if it has."""


@dataclass(frozen=True)
class GlobalBatch:
    """What one step learns from."""

    micro_batches: list[Batch]
    """Of this process."""
    learnt_tokens: float
    """Tokens that have a label, over all micro-batches and processes."""


class TrainStep:
    """The step of one job on this process.

    Args:
        before_update: called when the gradient is complete and before a parameter changes.
        may_update: asked before the update, with this process's sum of losses and the norm of the whole gradient; all
            processes must answer alike. If not, the step leaves everything as it was. None: every step updates.
        stage: makes the context in which a stage of the step runs; stages "forward" and "backward" once per
            micro-batch.
    """

    def __init__(
        self,
        model: Transformer,
        optimizers: Optimizers,
        world: World,
        training: Training,
        *,
        before_update: Callable[[], None] = lambda: None,
        may_update: Callable[[Tensor, Tensor], bool] | None = None,
        stage: Callable[[Stage], AbstractContextManager[object]] = lambda _: nullcontext(),
    ) -> None:
        self.model, self.optimizers, self.world, self.training = model, optimizers, world, training
        self.before_update, self.may_update, self.stage = before_update, may_update, stage
        self.dtype = compute_dtype(training.mixed_precision_param, world.device)
        self.precision = autocast(world.device, self.dtype)

    def __call__(self, batch: GlobalBatch, lr: float, done: float = 0.0) -> tuple[Tensor, Tensor]:
        """Compute the gradient and update the model; waits for no device.

        Args:
            lr: of the schedule, at this step.
            done: the share of the job's steps that are done after this one, for groups whose factor on `lr` changes.
        Returns:
            This process's sum of losses over its tokens, 0-d float32 on the device, and the norm of the whole gradient
            before clipping, 0-d float32.
        """
        statistics = self._running_statistics() if self.may_update is not None else {}
        loss_sum = torch.zeros((), device=self.world.device)
        for i, micro_batch in enumerate(batch.micro_batches):
            is_last = i == len(batch.micro_batches) - 1
            loss_sum += self._add_gradient(micro_batch, batch.learnt_tokens, is_last=is_last)
        self.optimizers.set_learning_rate(lr, done)
        with self.stage("exchange"):
            self.optimizers.exchange_expert_gradients()
        self.before_update()
        with self.stage("update"):
            grad_norm = self.optimizers.gradient_norm()
            if self.may_update is None or self.may_update(loss_sum, grad_norm):
                self.optimizers.clip_and_step(self.training.max_norm, grad_norm)
            else:
                self.optimizers.discard_gradient()
                for buffer, before in statistics.items():
                    buffer.copy_(before)
        return loss_sum, grad_norm

    def _running_statistics(self) -> dict[Tensor, Tensor]:
        """The buffers that a forward pass changes, and copies of them."""
        norms = (module for module in self.model.modules() if isinstance(module, QueryBatchNorm))
        return {buffer: buffer.clone() for norm in norms for buffer in (norm.running_mean, norm.running_var)}

    def _add_gradient(self, micro_batch: Batch, learnt_tokens: float, *, is_last: bool) -> Tensor:
        """Add a micro-batch's part to the gradient; returns its sum of losses, detached.

        Args:
            is_last: of the step's micro-batches; the dense gradient is summed over processes once, with this one.
        """
        if self.world.mesh is not None:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        with self.stage("forward"):
            loss = self.summed_loss(micro_batch)
        with self.stage("backward"):
            (loss * (1 / learnt_tokens)).backward()
        return loss.detach()

    def summed_loss(self, batch: Batch) -> Tensor:
        """The sum of -log p over the labels of a batch, 0-d, computed in the job's precision."""
        device = self.world.device
        inputs = (batch[key].to(device, non_blocking=True) for key in ("tokens", "document_ids", "labels"))
        with self.precision():
            return self.model(*inputs)  # type: ignore[no-any-return]


def read_global_batch(
    batches: Iterator[Batch],
    num_micro_batches: int,
    *,
    step: int,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> GlobalBatch:
    """Read this process's micro-batches of the next step. Called by every process.

    Batches that have tokens but nothing to learn from (documents of one token each) are skipped.

    Args:
        num_micro_batches: of this process.
        step: its number, for messages.
    Raises:
        EndOfDataError: no process has a token left.
        UserError: some process cannot read its data, or too many batches in a row have nothing to learn from.
    """
    for _ in range(MAX_EMPTY_BATCHES):
        micro_batches, failure = _read(batches, num_micro_batches)
        learnt = -math.inf if failure else sum((batch["labels"] != IGNORE_INDEX).sum() for batch in micro_batches)
        present = sum((batch["document_ids"] >= 0).sum() for batch in micro_batches)  # those of padding are negative
        counts = torch.tensor([float(learnt), float(present)], dtype=torch.float64)
        learnt_tokens, present_tokens = sum_over_processes(counts).tolist()
        if learnt_tokens < 0:
            on_all_processes(lambda failure=failure: _raise(failure))  # type: ignore[misc]
        if learnt_tokens > 0:
            return GlobalBatch(micro_batches, learnt_tokens)
        if present_tokens == 0:
            raise EndOfDataError
        logger.warning("step %d: a batch without a token to predict is skipped", step)
    raise UserError(f"data.sources: {MAX_EMPTY_BATCHES} batches in a row without a token to predict")


def _read(batches: Iterator[Batch], number: int) -> tuple[list[Batch], Exception | None]:
    """The step's micro-batches; or why there are none, which all processes must learn, not only this one."""
    try:
        return [next(batches) for _ in range(number)], None
    except Exception as failure:
        return [], failure


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
