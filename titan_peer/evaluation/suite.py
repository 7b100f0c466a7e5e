"""The evaluations that a job or a command line names: checked before any work; failures go into the results, not
raised."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from titan_peer.common.errors import TransientError, UserError
from titan_peer.config.data_source import DataSource, source_name
from titan_peer.config.job import Data, Evaluation
from titan_peer.data.loader import build_validation_dataloader
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.evaluation.language_model import EvaluationStoppedError, LanguageModel
from titan_peer.evaluation.results import Result
from titan_peer.metrics.held_out_loss import HeldOutLoss

logger = logging.getLogger("titan_peer")

Batches = Iterable[dict[str, Tensor]]


class GenerativeEvaluation(Protocol):
    """An evaluation that needs completions or log-likelihoods."""

    kind: str
    name: str

    def prepare(self) -> None:
        """Get what it needs, such as data to download; raises UserError."""
        ...

    def run(self, model: LanguageModel, records: Path | None) -> Result: ...


def held_out_batches(
    source: DataSource,
    key: str,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    data: Data,
    dp_rank: int = 0,
    dp_world_size: int = 1,
) -> Batches:
    """One pass over a held-out set, packed as in training.

    Args:
        key: the user's name for the set, for error messages.
        data: the training data's settings; packing and begin and end tokens are taken from it.
    Raises:
        UserError: the set cannot be read.
    """
    with _named(key):
        batches = build_validation_dataloader(
            sources=[source],
            tokenizer=tokenizer,
            seq_len=seq_len,
            local_batch_size=batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            data=data,
        )
    return _NamedBatches(batches, key)


class _NamedBatches:
    """Batches of a held-out set, whose errors use the user's name for it."""

    def __init__(self, batches: Batches, key: str) -> None:
        self._batches, self._key = batches, key

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        with _named(self._key):
            yield from self._batches


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Rename the only validation set to `key` in errors; a set given on a command line has no keys of its own."""
    try:
        yield
    except (UserError, TransientError) as error:
        message = str(error).replace("validation.sources[0]", key)
        if key.startswith("--"):
            message = message.replace(f"{key}.path = ", f"{key} ")
            message, advice, _ = message.partition(f"; {key}.on_bad_document")
            message += (
                "; a set in a job's [[evaluation.perplexity]] may have text_key and on_bad_document" if advice else ""
            )
        raise type(error)(message) from None


def generative_evaluations(settings: Evaluation) -> list[GenerativeEvaluation]:
    """The OpenAI evals and lm-eval tasks that the settings name.

    Raises:
        UserError: a package is not installed, or does not know a name.
    """
    found: list[GenerativeEvaluation] = []
    if settings.evals:
        from titan_peer.evaluation.openai_evals import OpenAIEval

        found += [OpenAIEval(n, limit=settings.limit, registry_path=settings.evals_registry) for n in settings.evals]
    if settings.tasks:
        from titan_peer.evaluation.lm_evaluation_harness import tasks

        found += tasks(settings.tasks, limit=settings.limit, tasks_path=settings.tasks_folder)
    return found


def run_one(evaluation: GenerativeEvaluation, model: LanguageModel, records: Path | None) -> Result:
    """The evaluation's result; if it fails, the result says why."""
    return _guarded(evaluation.kind, evaluation.name, lambda: evaluation.run(model, records))


def run_perplexity(source: DataSource, measure: Callable[[], HeldOutLoss]) -> Result:
    """Perplexity of one held-out set; if it fails, the result says why."""
    name = source_name(source)

    def run() -> Result:
        found = measure()
        return Result("perplexity", name, found.record(""), int(found.tokens))

    return _guarded("perplexity", name, run)


def _guarded(kind: str, name: str, run: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    try:
        result = run()
    except EvaluationStoppedError as stop:
        return Result(kind, name, error=str(stop), stopped=True)
    except (UserError, TransientError) as error:  # its message is complete without a traceback
        result = Result(kind, name, error=str(error))
    except Exception as error:
        logger.error("evaluation %s of %s failed", name, kind, exc_info=error)
        result = Result(kind, name, error=f"{type(error).__name__}: {error}")
    result = dataclasses.replace(result, seconds=time.perf_counter() - start)
    numbers = "  ".join(f"{metric} {value:.4f}" for metric, value in result.metrics.items())
    logger.info("evaluation %s: %s  (%.1f s)", name, result.error or numbers, result.seconds)
    return result
