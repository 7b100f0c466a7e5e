"""Evaluations of a training job's current weights at intervals, which do not influence the training.

Perplexity is measured on the training model itself by all processes together. Completions need a plain model: in a
single process it shares the training model's parameters; in several processes they are gathered temporarily. Each
process then runs its share of the evals and tasks alone, so that a slow or failing evaluation holds up no collective.
"""

from __future__ import annotations

import datetime
import gc
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from titan_peer.config.job import JobConfig
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.distributed.collectives import max_over_processes, new_gloo_group, on_all_processes
from titan_peer.distributed.parallelize import autocast, compute_dtype
from titan_peer.distributed.world import World
from titan_peer.dump_folder import METRICS
from titan_peer.evaluation.language_model import LanguageModel
from titan_peer.evaluation.results import Result, history_table, plot_history
from titan_peer.evaluation.suite import (
    Batches,
    GenerativeEvaluation,
    generative_evaluations,
    held_out_batches,
    run_one,
    run_perplexity,
)
from titan_peer.inference.generator import Generator
from titan_peer.metrics.callback import Callback, Run, Step
from titan_peer.metrics.held_out_loss import HeldOutLoss
from titan_peer.model import ModelArgs, Transformer, rope_table

logger = logging.getLogger("titan_peer")

# Processes wait for the process with the longest evaluations.
_LONGEST_EVALUATION = datetime.timedelta(days=2)


class PeriodicEvaluation(Callback):
    """The evaluations of a training job.

    It is made before the model, so that what is missing is noticed at once, and takes part in the run after `join`.

    Raises:
        UserError: a set cannot be read, a package is missing, a name is unknown, or data cannot be downloaded.
    """

    def __init__(self, config: JobConfig, tokenizer: Tokenizer, world: World) -> None:
        self.settings, self.model_args, self.tokenizer, self.world = config.evaluation, config.model, tokenizer, world
        self.precision = autocast(world.device, compute_dtype(config.training.mixed_precision_param, world.device))
        self.folder = Path(config.job.dump_folder)
        self.title = config.job.description or config.job.config_file
        on_all_processes(lambda: self._open(config))
        # Processes wait on the CPU, outside the training collectives' timeout.
        self.group = new_gloo_group(_LONGEST_EVALUATION) if world.size > 1 else None
        on_all_processes(self._prepare, self.group)

    def join(self, run: Run) -> PeriodicEvaluation:
        """Evaluate the model of this run from now on."""
        self._run = run
        return self

    def after_step(self, step: Step) -> None:
        if step.stop or not (step.is_last or step.number % self.settings.freq == 0):
            return
        run = self._run
        run.begin(f"evaluation after step {step.number}")
        start = time.perf_counter()
        results = self.run(step.number, run.model, run.held_out_loss, run.should_stop)
        seconds = time.perf_counter() - start
        run.metrics.log_evaluation(step.number, metrics_record(results), seconds)
        if self.world.is_first:
            self.write_report(self.folder / METRICS)
        run.metrics.exclude(seconds)

    def _open(self, config: JobConfig) -> None:
        self.held_out = [
            held_out_batches(
                source,
                f"evaluation.perplexity[{i}]",
                self.tokenizer,
                seq_len=config.training.seq_len,
                batch_size=self.settings.batch_size,
                data=config.data,
                dp_rank=self.world.dp_rank,
                dp_world_size=self.world.dp_degree,
            )
            for i, source in enumerate(self.settings.perplexity)
        ]
        self.evaluations = generative_evaluations(self.settings)

    def run(
        self,
        step: int,
        model: nn.Module,
        loss_on: Callable[[Batches], HeldOutLoss],
        should_stop: Callable[[], bool],
    ) -> list[Result]:
        """Evaluate, all processes together. A failure of an evaluation is reported in its result, not raised.

        Args:
            loss_on: measures the training model on this process's held-out batches, summed over all processes.
            should_stop: whether this process has been told to stop; evaluations that have not run by then are left out.
        Returns:
            the results of all evaluations, the same list on every process.
        """
        with _as_it_was(self.world.device):
            results = [
                run_perplexity(source, lambda batches=batches: loss_on(self._in_step(batches)))  # type: ignore[misc]
                for source, batches in zip(self.settings.perplexity, self.held_out)
            ]
            if self.evaluations:
                records = self.folder / "evaluation" / f"step-{step}"
                results += self._run_share(model, records, should_stop)
        return results

    def write_report(self, metrics_file: Path) -> None:
        """Write evaluation.md and evaluation.png from a run's metrics.jsonl; a failure to write is only logged."""
        try:
            records = [
                json.loads(line)
                for line in metrics_file.read_text(encoding="utf-8").splitlines()
                if '"evaluation/' in line
            ]
            report = f"# Evaluation: {self.title}\n\n{history_table(records)}\n"
            (self.folder / "evaluation.md").write_text(report, encoding="utf-8")
            plot_history(records, self.folder / "evaluation.png")
        except (OSError, ValueError) as error:
            logger.error("the evaluation report in %s was not written: %s", self.folder, error)

    # ---- internals

    def _prepare(self) -> None:
        """Prepare this process's share of the evaluations, for instance download data."""
        with _as_it_was(self.world.device):
            for evaluation in self._share():
                evaluation.prepare()

    def _share(self) -> list[GenerativeEvaluation]:
        return self.evaluations[self.world.rank :: self.world.size]

    def _run_share(self, model: nn.Module, records: Path, should_stop: Callable[[], bool]) -> list[Result]:
        """Run this process' share of the evaluations on a plain model; returns the results of all processes, in
        order."""
        mine = self._share()
        try:
            language_model = self._language_model(model, should_stop)
        except Exception as error:  # such as a GPU without room for the whole model
            logger.error("the weights could not be gathered for the evaluation", exc_info=error)
            why = f"{type(error).__name__}: {error}"
            results = [Result(evaluation.kind, evaluation.name, error=why) for evaluation in mine]
        else:
            results = [run_one(evaluation, language_model, records) for evaluation in mine]
        shares = on_all_processes(lambda: results, self.group)
        return [shares[i % len(shares)][i // len(shares)] for i in range(len(self.evaluations))]

    def _language_model(self, model: nn.Module, should_stop: Callable[[], bool]) -> LanguageModel:
        plain = whole_model(model, self.model_args, self.world.device, self.group)
        generator = Generator(plain, self.tokenizer, max_batch_size=self.settings.batch_size, compile=False)
        settings = self.settings
        return LanguageModel(generator, settings.max_new_tokens, settings.batch_size, self.precision, should_stop)

    def _in_step(self, batches: Batches) -> Iterator[dict[str, Tensor]]:
        """The batches; they end on all processes together, also if one of them cannot read any more."""
        iterator = iter(batches)
        while True:
            batch, problem = None, None
            try:
                batch = next(iterator, None)
            except Exception as error:
                problem = error
            state = torch.tensor([problem is not None, batch is None], dtype=torch.int32)
            max_over_processes(state, self.group)
            if state[0]:
                raise problem or RuntimeError("another process could not read its batches")
            if state[1] or batch is None:
                return
            yield batch


def whole_model(
    model: nn.Module, args: ModelArgs, device: torch.device, group: dist.ProcessGroup | None = None
) -> Transformer:
    """A plain Transformer, in evaluation mode, with the weights of a model that wrappers and shardings may cover.

    Parameters that are whole are shared, not copied; sharded ones are gathered (all processes must call).

    Args:
        group: a group of all processes that communicates tensors on the CPU; None takes the default group.
    Raises:
        ProcessesFailedError: on every process, when one of them has no room for the model.
    """
    state = get_model_state_dict(model)
    sharded = [t for t in state.values() if isinstance(t, DTensor)]
    on_all_processes(lambda: _require_room(sharded), group)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    with torch.device("meta"):
        plain = Transformer(args)
    plain.load_state_dict(whole, assign=True, strict=not args.tie_embeddings)
    if args.tie_embeddings:
        plain.output.weight = plain.tok_embeddings.weight
    plain.rope = rope_table(args.mla, args.max_seq_len, device)
    return plain.requires_grad_(False).eval()


def _require_room(sharded: Sequence[DTensor]) -> None:
    """Raise if this process has no memory to gather the tensors, before the others wait for it in the first
    gathering."""
    room = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in sharded]
    if sharded:  # a gathered tensor is put together from its parts
        largest = max(sharded, key=lambda t: t.numel() * t.element_size())
        room.append(torch.empty(largest.shape, dtype=largest.dtype, device=largest.device))


@contextmanager
def _as_it_was(device: torch.device) -> Iterator[None]:
    """Restore random states and the garbage collector's setting afterwards, and release memory."""
    python, numpy, collects = random.getstate(), np.random.get_state(), gc.isenabled()
    gc.enable()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if not collects:
                gc.disable()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def metrics_record(results: Sequence[Result]) -> dict[str, float]:
    """All results as one flat record for the metric sinks."""
    return {key: value for result in results for key, value in result.record().items()}
