"""The Trainer: builds the parts of a job and runs the loop."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_peer.analysis import dry_run
from titan_peer.analysis.model_size import model_size
from titan_peer.banner import banner, nothing_to_do, stopped
from titan_peer.checkpoint.checkpointer import Checkpointer
from titan_peer.common.host_memory import keep_freed_memory
from titan_peer.common.launched import launched_as
from titan_peer.config.job import JobConfig
from titan_peer.config.resolve import resolve_batch, resolve_vocabulary
from titan_peer.data.of_job import training_loader, validation_loader
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.distributed.collectives import on_all_processes, sum_over_processes
from titan_peer.distributed.float8 import precompute_scales_after_step
from titan_peer.distributed.parallelize import materialize, parallelize
from titan_peer.distributed.sharded_init import sharded_init
from titan_peer.distributed.world import World, init_world
from titan_peer.dump_folder import LOSS_PLOT, METRICS, JobLock, begin_reports, cannot_be_written
from titan_peer.evaluation.during_training import PeriodicEvaluation
from titan_peer.experts.balance import add_balance_loss
from titan_peer.experts.report import UsageReporter
from titan_peer.experts.revival import ExpertRevival
from titan_peer.failures import NonFiniteLossError, exit_status, is_first_process
from titan_peer.metrics.callback import Callback, GarbageCollection, Run, RunEnd, Step
from titan_peer.metrics.details import Details
from titan_peer.metrics.heartbeat import Heartbeat
from titan_peer.metrics.held_out_loss import TrainingModelLoss
from titan_peer.metrics.logger import MetricsLogger, plot_loss
from titan_peer.metrics.profiling import Profiler
from titan_peer.metrics.step_metrics import peak_memory_gib
from titan_peer.metrics.validation import Validation
from titan_peer.model import Transformer
from titan_peer.ops import set_table_gradient
from titan_peer.optim.optimizers import Optimizers
from titan_peer.optim.schedule import learning_rate_factor, schedule_cuts
from titan_peer.step_guard import StepGuard, not_finite
from titan_peer.train_step import (
    Batch,
    EndOfDataError,
    StepResult,
    TrainStep,
    read_global_batch,
)

logger = logging.getLogger("titan_peer")

SAVE_GRACE_SECONDS = 15  # how long a failed job waits for a checkpoint that is being written


class Trainer:
    """One training job on this process.

    Args:
        lock: the first process's lock on job.dump_folder; None: the caller keeps other jobs out of the folder.
    Raises (from the constructor, before any step, on every process):
        UserError: the job is invalid, or a file it names cannot be read.
        ProcessesFailedError: something else went wrong, on this process or another.
    """

    def __init__(self, config: JobConfig, world: World, lock: JobLock | None = None) -> None:
        self.config, self.world, self.device, self.lock = config, world, world.device, lock
        training = config.training
        self.dump_folder = Path(config.job.dump_folder)
        self._make_reproducible()

        self.accumulation_steps = resolve_batch(training, world.dp_degree)
        on_all_processes(self._open_data)
        evaluation = PeriodicEvaluation(config, self.tokenizer, world) if config.evaluation.enable else None

        with torch.device("meta"):
            model = Transformer(config.model)
        self.size = model_size(model, training.seq_len)
        model.loss_chunk_size = training.loss_chunk_size
        parallelize(model, config, world)
        materialize(model, self.device, offload=training.enable_cpu_offload)
        with sharded_init(config.debug.seed):
            model.init_weights()
        self.model = model
        tokens_per_step = training.local_batch_size * training.seq_len * self.accumulation_steps
        self.optimizers = Optimizers(model, config.optimizer, world.expert_mesh, tokens_per_step)
        self.optimizers.average_weights(training.ema_decay)
        precompute_scales_after_step(model, self.optimizers.dense, config.float8)

        self.step, self.tokens_seen = 0, 0
        self.guard = StepGuard(training, self._wait_and_sum)
        self.checkpointer = Checkpointer(config, model, self.optimizers)
        self._update = TrainStep(
            model,
            self.optimizers,
            world,
            training,
            before_update=self._before_update,
            may_update=self.guard.allows if training.skip_bad_steps else None,
        )
        if config.checkpoint.enable:
            self._resume()
        on_all_processes(self._begin_reports)
        if training.expert_balance_coeff:
            add_balance_loss(model, training.expert_balance_coeff, self.accumulation_steps * world.dp_degree)
        self.stop_signal, self.stop_time = 0, 0.0
        self._unreported: StepResult | None = None
        """The last step's result, until it is logged."""
        self.run = self._describe_run()
        self.validation: Validation | None = None
        if self.validation_loader is not None:
            self.validation = Validation(self.run, self.validation_loader)
        self.callbacks: list[Callback] = []
        on_all_processes(lambda: self.callbacks.extend(self._optional_parts(evaluation)))

    # ---- set-up

    def _make_reproducible(self) -> None:
        seed = self.config.debug.seed
        torch.manual_seed(seed)
        random.seed(seed)
        set_table_gradient(self.config.optimizer.table_gradient)
        if self.config.debug.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def _open_data(self) -> None:
        self.tokenizer = load_tokenizer(self.config.model.tokenizer_path)
        resolve_vocabulary(self.config.model, self.tokenizer.vocab_size)
        self.loader = training_loader(self.config, self.tokenizer, self.world)
        self.validation_loader = None
        if self.config.validation.enable:
            self.validation_loader = validation_loader(self.config, self.tokenizer, self.world)

    def _begin_reports(self) -> None:
        if self.world.is_first and self.step < self.config.training.steps:  # else nothing will be reported
            try:
                begin_reports(self.config, self.checkpointer.saved_step)
            except OSError as error:
                raise cannot_be_written(self.config, error) from None
        self.metrics = MetricsLogger(
            self.config,
            self.dump_folder,
            model=self.model,
            device=self.device,
            num_devices=self.world.size,
            training_flops_per_token=self.size.training_flops,
            total_steps=self.config.training.steps,
            resumed_step=self.step,
            enabled=self.world.is_first,
        )

    def _describe_run(self) -> Run:
        return Run(
            self.config,
            self.world,
            self.model,
            self.optimizers,
            self.metrics,
            TrainingModelLoss(self.model, self.device, self._update.summed_loss, sum_over_processes),
            precision=self._update.precision,
            resumed_step=self.step,
            begin=self._begin,
            should_stop=lambda: self.stop_signal != 0,
        )

    def _optional_parts(self, evaluation: PeriodicEvaluation | None) -> list[Callback]:
        """The callbacks that the job asks for, in the order in which they are called (metrics/callback.py)."""
        parts = (
            Heartbeat.of(self.run),
            UsageReporter.of(self.run),
            ExpertRevival.of(self.run),
            evaluation.join(self.run) if evaluation is not None else None,
            Details.of(self.run),
            GarbageCollection.of(self.run),
            Profiler.of(self.run),
        )
        return [part for part in parts if part is not None]

    def _resume(self) -> None:
        state = self.checkpointer.load()
        self.optimizers.refresh_copies()
        if state is None:
            return
        self.step, self.tokens_seen = state.get("step", 0), state.get("tokens_seen", 0)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        if "data" in state:
            on_all_processes(lambda: self.loader.load_state_dict(state["data"]))
        logger.info("resumed from step %d (%s tokens seen)", self.step, f"{self.tokens_seen:,}")

    # ---- the loop

    def train(self) -> int:
        """Train to the last step or a signal; returns the process's exit status."""
        config = self.config
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._on_signal)
        if self.world.is_first:
            logger.info(banner(self.run, self.size, self.tokenizer, self._update.dtype))
            for cut in schedule_cuts(config.training.steps, config.lr_scheduler):
                logger.warning("warning: %s", cut)
        if self.step >= config.training.steps:
            self._say(nothing_to_do(self.step, config.training.steps))
            self._close(RunEnd(self.step))
            return 0
        try:
            for callback in self.callbacks:
                callback.start()
            self._loop()
        except BaseException as error:
            self._close(RunEnd(self.step, error, together=isinstance(error, NonFiniteLossError)))
            raise
        self._close(RunEnd(self.step))
        self._finish()
        return 0

    def _loop(self) -> None:
        config = self.config
        batches = iter(self.loader)
        self.model.train()
        while self.step < config.training.steps:
            self.step += 1
            self._begin(f"step {self.step}")
            if self.lock is not None:
                self.lock.require_mine()
            try:
                result = self.train_step(batches)
            except EndOfDataError:
                self._end_early()
                break
            self._require_good(result)
            self._unreported = None if result.skipped else result
            step = Step(self.step, is_last=self.step == config.training.steps, stop=result.stop)
            if self.metrics.due(self.step) or step.stop:
                self._log_step()
            for callback in self.callbacks:
                callback.after_update(step)
            if self.validation is not None and (step.is_last or self.validation.due(self.step)):
                self.validation.validate(self.step)
            if config.checkpoint.enable and (step.is_last or step.stop or self.step % config.checkpoint.interval == 0):
                self.save_checkpoint(last=step.is_last, wait=step.is_last or step.stop)
            for callback in self.callbacks:
                callback.after_step(step)
            if step.stop and not step.is_last:
                self._say(stopped(self.step, config.training.steps, saves=config.checkpoint.enable))
                break
        self.checkpointer.finish()
        self._report_saved()

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step over the global batch. Called by every process.

        Raises:
            EndOfDataError, UserError: as `read_global_batch`.
        """
        training = self.config.training
        batch = read_global_batch(
            batches, self.accumulation_steps, step=self.step, sum_over_processes=self._wait_and_sum
        )
        lr = self.config.optimizer.lr * learning_rate_factor(self.step, training.steps, self.config.lr_scheduler)
        loss_sum, grad_norm = self._update(batch, lr, self.step / training.steps)
        told_to_stop = torch.tensor(float(self.stop_signal != 0), dtype=torch.float64)
        sums = self._wait_and_sum(torch.stack([loss_sum.double().cpu(), told_to_stop]))
        tokens = training.global_batch_size * training.seq_len
        self.tokens_seen += tokens
        self.metrics.count(tokens)
        loss = (sums[0] / batch.learnt_tokens).item()
        return StepResult(loss, grad_norm.item(), lr, stop=bool(sums[1] > 0), skipped=self.guard.why)

    def _log_step(self) -> None:
        """Report the last step, unless that has been done. Called by every process."""
        result, self._unreported = self._unreported, None
        if result is not None:
            self.metrics.log_step(
                self.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.lr,
                tokens_seen=self.tokens_seen,
                data=self.loader.statistics(),
            )

    def save_checkpoint(self, *, last: bool, wait: bool) -> None:
        self._begin(f"saving the checkpoint of step {self.step}")
        start = time.perf_counter()
        state = {"step": self.step, "tokens_seen": self.tokens_seen, "data": self.loader.state_dict()}
        if self.config.training.skip_bad_steps:
            state["guard"] = self.guard.state_dict()
        model_only = last and self.config.checkpoint.last_save_model_only
        self.checkpointer.save(self.step, state, wait=wait, model_only=model_only)
        self._report_saved()
        self.metrics.exclude(time.perf_counter() - start)

    def _report_saved(self) -> None:
        for step, folder in self.checkpointer.newly_saved():
            self.metrics.log_checkpoint(step, folder)

    # ---- details

    def _before_update(self) -> None:
        self.checkpointer.wait_until_copied()  # an asynchronous save may still be copying the parameters
        for callback in self.callbacks:
            callback.before_update(self.step)

    def _begin(self, doing: str) -> None:
        for callback in self.callbacks:
            callback.begin(doing)

    def _wait_and_sum(self, values: Tensor) -> Tensor:
        """Sum over processes in a training step, where the time spent waiting for the slowest process is measured."""
        with self.metrics.waiting():
            return sum_over_processes(values)

    def _require_good(self, result: StepResult) -> None:
        """Report a step that has been skipped.

        Raises:
            NonFiniteLossError: the weights may have been spoilt, or too many steps in a row have been skipped.
        """
        if result.skipped:
            if self.world.is_first:
                logger.warning("step %d is skipped: %s", self.step, self.guard.told())
            self.metrics.log_record({"step": self.step, "skipped_steps": self.guard.skipped})
            if not self.guard.must_end:
                return
            message = f"step {self.step}: {self.guard.told()}, more than training.skip_bad_steps allows"
        elif math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return
        else:
            message = (
                f"step {self.step}: loss = {result.loss}, gradient norm = {result.grad_norm}, learning rate = "
                f"{result.lr:.3e}, tokens seen = {self.tokens_seen:,}; parameters no longer finite: {not_finite(self.model)}"
            )
        message += (
            f". The last checkpoint is step {self.checkpointer.saved_step}; try a lower optimizer.lr, more "
            "lr_scheduler.warmup_steps, or another debug.seed"
        )
        self.metrics.alert(self.step, "loss or gradient is not finite", message)
        raise NonFiniteLossError(message)

    def _on_signal(self, signal_number: int, _frame: Any) -> None:
        # A launcher passes on what a scheduler has sent to every process already: only a second Ctrl-C is meant to end
        # at once.
        if self.stop_signal and signal_number == signal.SIGINT and time.monotonic() - self.stop_time > 1:
            signal.signal(signal_number, signal.SIG_DFL)
            os.kill(os.getpid(), signal_number)
        if not self.stop_signal:
            self.stop_signal, self.stop_time = signal_number, time.monotonic()

    def _end_early(self) -> None:
        """Undo the empty step; report, validate and save what the steps before it made."""
        self.step -= 1
        self._log_step()
        self._say(f"the data ended after step {self.step} of {self.config.training.steps}")
        self.checkpointer.finish()  # its save may still be copying the weights, which validation may swap
        if self.validation is not None and not self.validation.due(self.step):
            self.validation.validate(self.step)
        if self.config.checkpoint.enable and self.checkpointer.saved_step != self.step:
            self.save_checkpoint(last=True, wait=True)

    def _say(self, line: str) -> None:
        if self.world.is_first:
            logger.info("%s", line)

    def _let_running_save_end(self, failure: BaseException) -> None:
        """Wait a little for the checkpoint that is being written, which completes unless it waits for a lost
        process."""
        # a launcher that has noticed the failure need not wait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            self.checkpointer.finish(timeout=SAVE_GRACE_SECONDS)
        except TimeoutError:
            # A thread inside a collective cannot be interrupted, and leaving with it alive can abort the interpreter.
            status = exit_status(failure)
            sys.stderr.flush()
            os._exit(status)
        except Exception as error:  # most likely because of the same lost process; the first failure is raised again
            logger.error("the checkpoint that was being written is lost: %s", error)

    def _close(self, end: RunEnd) -> None:
        """End the callbacks, the save that is running and the reports: all of them, even if one callback fails to end.

        Raises:
            Exception: the first callback's failure to end, unless the run itself has failed.
        """
        not_ended: Exception | None = None
        for callback in reversed(self.callbacks):
            try:
                callback.end(end)
            except Exception as error:
                logger.error("%s could not end: %s", type(callback).__name__, error)
                not_ended = not_ended or error
        if end.failure is not None:
            self._let_running_save_end(end.failure)
        self.metrics.close()
        if not_ended is not None and end.failure is None:
            raise not_ended

    def _finish(self) -> None:
        if not self.world.is_first:
            return
        plot = self.dump_folder / LOSS_PLOT
        try:
            plot_loss(self.dump_folder / METRICS, plot, self.config.job.description or "loss")
        except OSError as error:
            logger.error("the loss plot could not be written: %s", error)
        logger.info("peak memory %.2f GiB; loss plot %s", peak_memory_gib(self.device), plot)


def run_job(config: JobConfig) -> int:
    """Run a valid job on this process, or trace a step of it (comm.mode = "fake_backend"); returns the exit status."""
    try:
        if config.comm.mode == "fake_backend":
            if is_first_process():
                print(dry_run.report(config, launched_as()[1]))
            return 0
        keep_freed_memory()
        return _train(config)
    except Exception as failure:
        return exit_status(failure)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(config: JobConfig) -> int:
    world = init_world(config.parallelism)
    locks: list[JobLock] = []  # one on the first process, which holds it for all
    on_all_processes(lambda: locks.append(JobLock(config)) if world.is_first else None)
    lock = locks[0] if locks else None
    try:
        return Trainer(config, world, lock).train()
    finally:
        if lock is not None:
            lock.release()
