"""EleutherAI's lm-evaluation-harness (`lm_eval`) on our models: the model class "titan_peer", and tasks as evaluations.

Importing this module registers the model class with lm_eval. `python -m titan_peer.evaluation.lm_evaluation_harness`
takes the arguments of the `lm_eval` command.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from titan_peer.common.errors import UserError
from titan_peer.evaluation.environment import environment
from titan_peer.evaluation.language_model import LanguageModel
from titan_peer.evaluation.results import Result
from titan_peer.inference.generator import SamplingParams

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"lm-eval cannot be imported ({error}); install it with: pip install 'titan_peer[lm-eval]'"
    ) from None

logger = logging.getLogger("titan_peer")

BUNDLED_TASKS = Path(__file__).parent / "lm_eval_tasks"
_BOOTSTRAP_ITERATIONS = 1000
_LM_EVALS_DEVICE = "cuda:0"
_FEWSHOT_SEED = 1234  # lm_eval's own default


@register_model("titan_peer")
class TitanPeerLM(TemplateLM):  # type: ignore[misc]
    """A model in lm_eval's interface.

    Args: (`lm_eval --model_args checkpoint=...,max_new_tokens=... --device ... --batch_size ...`)
        checkpoint: a job's folder, or `<dump_folder>/checkpoint/step-N`; or a LanguageModel.
        device, batch_size, max_new_tokens: as for `titan-peer eval`.
    """

    def __init__(
        self,
        checkpoint: str | LanguageModel,
        device: str | None = "auto",
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        if not isinstance(checkpoint, LanguageModel):
            from titan_peer.evaluation.load import load_language_model

            size = 16 if batch_size in (None, "auto") else int(batch_size)
            checkpoint, _ = load_language_model(
                checkpoint, device=_device(device), batch_size=size, max_new_tokens=int(max_new_tokens)
            )
        self.model = checkpoint

    @property
    def eot_token_id(self) -> int:
        eos = self.model.tokenizer.eos_id
        return self.model.prefix_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        return self.model.prefix_id

    @property
    def max_length(self) -> int:
        return self.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"titan_peer-{self.model.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.tokenizer.encode_batch([self.model.whole(string)])[0]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        bos = [] if self.model.tokenizer.bos_id is None else [self.model.tokenizer.bos_id]
        pairs = [
            (context if context[:1] == bos else bos + context, continuation) for _, context, continuation in requests
        ]
        scores = self.model.log_likelihoods(pairs)
        for (texts, _, _), score in zip(requests, scores):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs += [make_disjoint_window(window) for window in windows]
            owners += [i] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self.model.log_likelihoods(pairs)):
            totals[owner] += score
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        params = [self._sampling(request.args[1]) for request in requests]
        texts = self.model.complete([request.args[0] for request in requests], params)
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, settings: dict[str, Any]) -> SamplingParams:
        temperature = settings.get("temperature") if settings.get("do_sample") else 0.0
        return self.model.sampling(
            settings.get("max_gen_toks"), temperature, settings.get("top_p"), settings.get("until")
        )


def _device(asked: str | None) -> str:
    """The device that the lm_eval command asks for; by default it asks for a GPU even if there is none."""
    if asked == _LM_EVALS_DEVICE and not torch.cuda.is_available():
        logger.warning("lm_eval asks for %s, as it does by default; there is none, so the model is on the CPU", asked)
        return "cpu"
    return asked or "auto"


@contextmanager
def _quiet_in_a_log() -> Iterator[None]:
    """Show lm_eval's progress bars only on a terminal, send its messages to standard error (standard output is for the
    table), and keep its bootstrap from forking a process that trains."""
    with ExitStack() as stack:
        stack.enter_context(environment(DISABLE_MULTIPROC="1"))
        if not sys.stderr.isatty():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _task_manager(names: Sequence[str], tasks_path: str) -> TaskManager:
    """A task manager that knows the names; lm_eval's own 15,000 task files, which take many seconds, are read only if
    needed."""
    paths = [str(BUNDLED_TASKS), *([tasks_path] if tasks_path else [])]
    local = TaskManager(include_path=paths, include_defaults=False)
    if all(local.match_tasks([name]) for name in names):
        return local
    return TaskManager(include_path=paths)


class LMEvalTask:
    """One lm_eval task or group.

    Raises:
        UserError: lm_eval is not installed, or knows no such task.
    """

    kind = "tasks"

    def __init__(self, name: str, manager: TaskManager, limit: int = -1) -> None:
        self.name, self.manager, self.limit = name, manager, limit
        self._loaded: Any = None  # for the first run
        if not manager.match_tasks([name]):
            import difflib

            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.4)
            raise UserError(f"tasks: lm_eval has no task {name!r}; the nearest names: {', '.join(near)}")

    def prepare(self) -> None:
        """Load the task's data, which lm_eval downloads for its own tasks.

        Raises:
            UserError: the data cannot be downloaded or read.
        """
        if self._loaded is not None:
            return
        try:
            with _quiet_in_a_log():
                self._loaded = self.manager.load(self.manager.match_tasks([self.name]))
        except Exception as error:  # from datasets, the network, pyarrow or a task's own code
            causes = list(_causes(error))
            lines = [f"{type(e).__name__}: {e}".splitlines()[0] for e in dict.fromkeys([error, causes[-1]])]
            advice = f"\n{_network_advice()}" if _needs_network(error) else ""
            raise UserError(
                f"tasks: {self.name}: its data cannot be loaded: {'; because of '.join(lines)}{advice}"
            ) from None

    def run(self, model: LanguageModel, records: Path | None = None) -> Result:
        """Run the task.

        Args:
            records: folder for every sample's prompt, answer and scores (JSON lines); None: not written.
        """
        self.prepare()
        loaded, self._loaded = self._loaded, None
        assert loaded is not None
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(_FEWSHOT_SEED)
        with _quiet_in_a_log():
            report = lm_eval.evaluate(
                TitanPeerLM(model),
                loaded,
                limit=None if self.limit == -1 else self.limit,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=records is not None,
            )
        if records is not None:
            records.mkdir(parents=True, exist_ok=True)
            for task, samples in report["samples"].items():
                lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
                # half of a surrogate pair is written as in JSON
                written = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
                (records / f"{task}.jsonl").write_bytes(written)
        return Result(self.kind, self.name, dict(_metrics(report, self.name)), _num_samples(report))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and the chain of its causes."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _needs_network(error: Exception) -> bool:
    names = "Connect|Offline|LocalEntryNotFound|Timeout"
    return any(re.search(names, type(cause).__name__) for cause in _causes(error))


def _network_advice() -> str:
    bundled = ", ".join(sorted(file.stem for file in BUNDLED_TASKS.glob("*.yaml")))
    return (
        "data of lm-eval's own tasks are downloaded: run this once with a network, so that they are stored in the folder "
        f"HF_HOME (~/.cache/huggingface), or choose tasks that come with their data: {bundled}"
    )


def _metrics(report: dict[str, Any], name: str) -> Sequence[tuple[str, float]]:
    """Metrics by name; lm_eval calls a metric "acc,none" with the usual filter "none", and here it is "acc"."""
    found = []
    for task, values in (report.get("groups") or report["results"]).items():
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
                metric, _, filter_name = key.partition(",")
                metric += "" if filter_name == "none" else f" ({filter_name})"
                found.append((metric if task == name else f"{task} {metric}", float(value)))
    return found


def _num_samples(report: dict[str, Any]) -> int:
    return sum(counts["effective"] for counts in report.get("n-samples", {}).values())


def tasks(names: Sequence[str], *, limit: int = -1, tasks_path: str = "") -> list[LMEvalTask]:
    """The tasks with these names.

    Args:
        tasks_path: a folder with further task files (YAML).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(names, tasks_path)
    return [LMEvalTask(name, manager, limit) for name in names]


def main() -> int:
    """lm_eval's own command; returns the exit status."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not _needs_network(error):
            raise
        print(f"error: {type(error).__name__}: {error}\n{_network_advice()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
