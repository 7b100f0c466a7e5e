"""OpenAI evals (the `evals` package) on our models: the model as a completion function, and the package's evals as our
evaluations.

The package builds an API client when it is imported, which needs a key; the client is never used, so any string will
do.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from titan_peer.common.characters import with_whole_characters
from titan_peer.common.errors import UserError
from titan_peer.evaluation.batching import RequestBatcher
from titan_peer.evaluation.environment import environment
from titan_peer.evaluation.language_model import LanguageModel
from titan_peer.evaluation.results import BOOTSTRAP_OF, Result
from titan_peer.inference.generator import SamplingParams

INSTALL = "pip install 'titan_peer[evals]' && pip install --no-deps evals"
PREFIX = "titan_peer/"
# A completion that starts the next turn of the conversation has finished its answer.
_TURNS = ("\nUser:", "\nSystem:", "\nAssistant:")
# An eval with more different answers than this over its samples is not treated as multiple-choice.
_MAX_CHOICES = 10
_SEED = 20220722  # oaieval's own default
_MATCH = "evals.elsuite.basic.match:Match"
_MULTIPLE_CHOICE = "evals.elsuite.multiple_choice:MultipleChoice"


@contextmanager
def _package(batch_size: int = 1) -> Iterator[Any]:
    """The imported `evals`, with its environment variables set: a key, threads, and progress on terminals only."""
    settings = {
        "OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY") or "unused",
        "EVALS_THREADS": str(batch_size),
        "EVALS_SHOW_EVAL_PROGRESS": "1" if sys.stderr.isatty() else "",
    }
    with environment(**settings):
        try:
            import evals.cli.oaieval
        except ImportError as error:
            raise UserError(f"OpenAI evals cannot be imported ({error}); install them with: {INSTALL}") from None
        yield evals


# --------------------------------------------------------------------------------------------------------------------
# The model as a completion function


class _Request(NamedTuple):
    prompt: str
    params: SamplingParams
    choices: tuple[str, ...]


class Completion:
    """A completion function's answer, in the package's interface (`CompletionResult`)."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_completions(self) -> list[str]:
        return [self.text]


class ModelCompletionFn:
    """`evals.api.CompletionFn` on a model: evals call it from many threads, it answers in batches.

    A chat prompt is written as the package does it for models without chat ("User: ...", "Assistant:"). Sampling is
    greedy unless the eval asks for a temperature. White space around prompt and completion is dropped, because the
    result must not depend on where a tokenizer puts the space between them.

    Args:
        choices: if given, the answer is the most probable of these by log-likelihood; "letters": of the letters that
            the prompt offers as "A) ...".
    """

    def __init__(self, model: LanguageModel, choices: Sequence[str] | str = ()) -> None:
        self.model, self.choices = model, choices
        self._batcher = RequestBatcher(self._answer_all, model.batch_size)

    def __enter__(self) -> ModelCompletionFn:
        return self

    def __exit__(self, *error: object) -> None:
        self._batcher.close()

    def __call__(self, prompt: Any, **kwargs: Any) -> Completion:
        from evals.prompt.base import CompletionPrompt, is_chat_prompt
        from evals.record import record_sampling

        text = prompt.to_formatted_prompt() if hasattr(prompt, "to_formatted_prompt") else prompt
        stop = kwargs.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if is_chat_prompt(text):
            text = CompletionPrompt(text).to_formatted_prompt()
            stop += _TURNS
        params = self.model.sampling(kwargs.get("max_tokens"), kwargs.get("temperature"), kwargs.get("top_p"), stop)
        request = _Request(text.rstrip(), params, self._choices_of(text))
        answer = self._batcher(request)
        record_sampling(**_whole({"prompt": text, "sampled": answer, "choices": list(request.choices)}))
        return Completion(answer)

    def _choices_of(self, prompt: str) -> tuple[str, ...]:
        if self.choices == "letters":
            return tuple(dict.fromkeys(re.findall(r"^([A-Z])\) ", prompt, re.M)))
        return tuple(self.choices)

    def _answer_all(self, requests: list[_Request]) -> list[str]:
        free = [request for request in requests if not request.choices]
        texts = iter(self.model.complete([r.prompt for r in free], [r.params for r in free]))
        chosen = iter(self._most_probable([request for request in requests if request.choices]))
        return [next(chosen) if request.choices else next(texts).strip() for request in requests]

    def _most_probable(self, requests: Sequence[_Request]) -> list[str]:
        if not requests:
            return []
        pairs = [(request.prompt, f" {choice}") for request in requests for choice in request.choices]
        scores = iter(self.model.log_likelihoods(pairs))
        likelihoods = [{choice: next(scores)[0] for choice in request.choices} for request in requests]
        return [max(of_request, key=lambda choice: of_request[choice]) for of_request in likelihoods]


class CheckpointCompletionFn(ModelCompletionFn):
    """A completion function on a checkpoint, for `oaieval titan_peer/<checkpoint>`.

    Args: (those after `checkpoint` are given with `oaieval --completion_args name=value,...`)
        checkpoint: a job's folder, or `<dump_folder>/checkpoint/step-N`.
        choices: answers to choose from by log-likelihood, separated by "/"; or "letters".
        device, batch_size, max_new_tokens: as for `titan-peer eval`.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        batch_size: int | str = 16,
        max_new_tokens: int | str = 32,
        choices: str = "",
        registry: Any = None,
    ) -> None:
        from titan_peer.evaluation.load import load_language_model

        model, _ = load_language_model(
            checkpoint, device=device, batch_size=int(batch_size), max_new_tokens=int(max_new_tokens)
        )
        super().__init__(model, choices if choices == "letters" else [c for c in choices.split("/") if c])


def write_registry(folder: Path, checkpoint: Path) -> Path:
    """Register the checkpoint for `oaieval` as `titan_peer/<checkpoint>`, in a registry file in `folder`.

    `oaieval` looks for registries in `~/.evals` and in `--registry_path`. Earlier entries of the file are kept.
    """
    import yaml

    file = folder / "completion_fns" / "titan_peer.yaml"
    entries: dict[str, Any] = {}
    if file.exists():
        entries = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    name = PREFIX + checkpoint.as_posix().strip("/")
    class_path = f"{CheckpointCompletionFn.__module__}:{CheckpointCompletionFn.__qualname__}"
    entries[name] = {"class": class_path, "args": {"checkpoint": str(checkpoint.resolve())}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(entries), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None
    return file


# --------------------------------------------------------------------------------------------------------------------
# The package's evals as evaluations


@functools.cache
def _registry(path: str) -> Any:
    """The package's registry and that of the folder `path`, if any; cached, since the package's 460 files take
    seconds."""
    from evals.registry import Registry

    registry = Registry()
    if path:
        registry.add_registry_paths([path])
    return registry


class OpenAIEval:
    """One eval of the registry, such as test-match.

    Raises:
        UserError: the package is not installed, or has no eval with this name.
    """

    kind = "evals"

    def __init__(self, name: str, *, limit: int = -1, registry_path: str = "") -> None:
        self.name, self.limit, self.registry_path = name, limit, registry_path
        with _package():
            registry = _registry(self.registry_path)
            if registry.get_eval(name) is None:
                import difflib

                near = difflib.get_close_matches(name, registry._evals, n=3, cutoff=0.4)
                raise UserError(f"evals: no eval {name!r} in the registry; the nearest names: {', '.join(near)}")

    def prepare(self) -> None:
        """Nothing to do: the package contains its data."""

    def run(self, model: LanguageModel, records: Path | None = None) -> Result:
        """Run the eval by generation and, if its answers are a small closed set, also by log-likelihood.

        Args:
            records: folder for every sample's prompt, answer and verdict (JSON lines); None: not kept.
        """
        with tempfile.TemporaryDirectory() as scratch, _package(model.batch_size):
            folder = Path(scratch) if records is None else records
            folder.mkdir(parents=True, exist_ok=True)
            report, samples = self._report(ModelCompletionFn(model), folder / f"{self.name}.jsonl")
            metrics = dict(_numbers(report))
            if choices := self._closed_answers():
                by_likelihood = ModelCompletionFn(model, choices)
                report, _ = self._report(by_likelihood, folder / f"{self.name}.log_likelihood.jsonl")
                wanted = ("accuracy", BOOTSTRAP_OF["accuracy"])
                metrics |= {f"{key}_by_log_likelihood": value for key, value in _numbers(report) if key in wanted}
        return Result(self.kind, self.name, metrics, samples)

    def _report(self, completion_fn: ModelCompletionFn, record_file: Path) -> tuple[Mapping[str, Any], int]:
        """The eval's final report and number of samples; as `oaieval` does it, but without leaving its recorder
        registered."""
        from evals.base import RunSpec
        from evals.eval import set_max_samples

        registry = _registry(self.registry_path)
        spec = registry.get_eval(self.name)
        base_eval, split = spec.key.split(".")[:2]
        config = {"eval_spec": spec, "seed": _SEED, "max_samples": self.limit}
        recorder = _recorder(record_file, RunSpec([PREFIX], spec.key, base_eval, split, config, created_by=""))
        evaluation = registry.get_class(spec)(
            completion_fns=[completion_fn],
            seed=_SEED,
            name=spec.key,
            eval_registry_path=spec.registry_path,
            registry=registry,
        )
        set_max_samples(None if self.limit == -1 else self.limit)
        try:
            with completion_fn:
                report = evaluation.run(recorder)
            recorder.flush_events()
            recorder.record_final_report(report)
        finally:
            set_max_samples(None)
            atexit.unregister(recorder.flush_events)
        with record_file.open(encoding="utf-8", newline="\n") as lines:
            events = [json.loads(line) for line in lines]
        return report, len({event["sample_id"] for event in events if event.get("sample_id")})

    def _closed_answers(self) -> Sequence[str] | str:
        """The choices for log-likelihood; empty for an eval with open answers."""
        from evals.data import get_jsonl

        spec = _registry(self.registry_path).get_eval(self.name)
        if spec.cls == _MULTIPLE_CHOICE:
            return "letters"
        if spec.cls != _MATCH:
            return ()
        samples = spec.args["samples_jsonl"]
        path = samples if Path(samples).is_file() else spec.registry_path / "data" / samples
        ideals = (sample["ideal"] for sample in get_jsonl(str(path)))
        answers = list(dict.fromkeys(ideal[0] if isinstance(ideal, list) else ideal for ideal in ideals))
        return answers if 2 <= len(answers) <= _MAX_CHOICES and all(answers) else ()


def _recorder(file: Path, run_spec: Any) -> Any:
    """The package's file recorder, but with lone surrogates replaced, at which the original would fail."""
    from evals.record import Event, LocalRecorder

    class Recorder(LocalRecorder):  # type: ignore[misc]
        def _flush_events_internal(self, events_to_write: Sequence[Event]) -> None:
            super()._flush_events_internal([dataclasses.replace(e, data=_whole(e.data)) for e in events_to_write])

    return Recorder(str(file), run_spec)


def _whole(data: Any) -> Any:
    """A record's data with `with_whole_characters` applied to every text in it."""
    if isinstance(data, str):
        return with_whole_characters(data)
    if isinstance(data, dict):
        return {_whole(key): _whole(value) for key, value in data.items()}
    return [_whole(value) for value in data] if isinstance(data, list | tuple) else data


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in report.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            # the package's own spelling of "bootstrap"
            yield key.replace("boostrap", "bootstrap"), float(value)
