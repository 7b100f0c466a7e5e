"""`titan-peer eval`: evaluate a checkpoint."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from titan_peer.checkpoint.choice import WHAT_TO_GIVE, find_checkpoint
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import Problems, UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Evaluation

logger = logging.getLogger("titan_peer")

EXAMPLES = """examples:
  titan-peer eval --checkpoint outputs/debug_model --perplexity assets/sample_text/validation.jsonl
  titan-peer eval --checkpoint outputs/debug_model --evals test-match,rectangles --limit 50
  titan-peer eval --checkpoint outputs/debug_model --tasks sample_text_continuation,sample_text_last_word,sample_text_copy --output results
  titan-peer eval --checkpoint outputs/debug_model --register_with_oaieval

The table goes to standard output, everything else to standard error. The exit status is 1 if an evaluation failed.
"""


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parser() -> argparse.ArgumentParser:
    defaults = Evaluation()
    parser = CommandParser("eval", "Evaluate a checkpoint: perplexity, OpenAI evals, lm-eval tasks.", EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help=WHAT_TO_GIVE)
    add(
        "--perplexity",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="held-out text: a file, folder or glob pattern as for [[data.sources]]; may be given several times",
    )
    add("--evals", type=_names, default=[], metavar="NAME,...", help="OpenAI evals, such as test-match")
    add("--evals_registry", default="", metavar="DIR", help="folder of further evals")
    add("--tasks", type=_names, default=[], metavar="NAME,...", help="lm-eval tasks, such as sample_text_continuation")
    add("--tasks_folder", default="", metavar="DIR", help="folder of further lm-eval task files")
    add("--limit", type=int, default=-1, help="samples per eval or task; -1: all (default)")
    add("--batch_size", type=int, default=defaults.batch_size, help="sequences at a time (default %(default)s)")
    add(
        "--max_new_tokens",
        type=int,
        default=defaults.max_new_tokens,
        help="tokens of a completion where an eval or task sets no limit (default %(default)s)",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="dtype of matmuls; auto: bfloat16 where the device has it in hardware, as in training (default)",
    )
    add("--ema", action="store_true", help="take the moving averages of the weights (training.ema_decay)")
    add("--output", type=Path, metavar="DIR", help="also write results.json, results.md and every sample's record here")
    add(
        "--register_with_oaieval",
        nargs="?",
        type=Path,
        const=Path.home() / ".evals",
        metavar="DIR",
        help="make the checkpoint known to the oaieval command as titan_peer/<checkpoint>, by a file in DIR (default "
        "~/.evals, where oaieval looks by default); evaluates nothing",
    )
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(args)
    if options.register_with_oaieval is not None and options.ema:
        raise UserError("--ema: does not go with --register_with_oaieval, which knows a checkpoint by its folder only")
    if options.register_with_oaieval is not None:
        return _register(options.register_with_oaieval, options.checkpoint)
    problems = Problems()
    with problems.collected():
        checkpoint = find_checkpoint(options.checkpoint, "--checkpoint")
    sources: list[DataSource] = []
    for text in options.perplexity:
        with problems.collected():
            sources.append(_source(text))
    settings = Evaluation(
        perplexity=sources,
        evals=options.evals,
        evals_registry=options.evals_registry,
        tasks=options.tasks,
        tasks_folder=options.tasks_folder,
        limit=options.limit,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    if not (options.perplexity or settings.evals or settings.tasks):
        problems.found.append("nothing to evaluate: give --perplexity, --evals or --tasks")
    for flag, value in (("--batch_size", settings.batch_size), ("--max_new_tokens", settings.max_new_tokens)):
        problems.add_if(value < 1, f"{flag} {value}: must be at least 1")
    is_no_limit = settings.limit < 1 and settings.limit != -1
    problems.add_if(is_no_limit, f"--limit {settings.limit}: must be at least 1, or -1 for all")
    problems.refuse()
    return _evaluate(options, settings, checkpoint)


def _evaluate(options: argparse.Namespace, settings: Evaluation, checkpoint: Path) -> int:
    from titan_peer.evaluation.load import load_language_model
    from titan_peer.evaluation.perplexity import loss_on
    from titan_peer.evaluation.results import result_table, write_results
    from titan_peer.evaluation.suite import generative_evaluations, held_out_batches, run_one, run_perplexity

    evaluations = generative_evaluations(settings)
    for evaluation in evaluations:
        evaluation.prepare()
    model, job = load_language_model(
        checkpoint,
        device=options.device,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        precision=options.precision,
        ema=options.ema,
    )
    if evaluations:
        logger.info(model.generator.decoder.report())
    if options.output is not None:
        _make_folder(options.output)
    held_out = [
        held_out_batches(
            source,
            "--perplexity",
            model.tokenizer,
            seq_len=job.training.seq_len,
            batch_size=settings.batch_size,
            data=job.data,
        )
        for source in settings.perplexity
    ]
    results = [
        run_perplexity(source, partial(loss_on, model, batches))
        for source, batches in zip(settings.perplexity, held_out)
    ]
    results += [run_one(evaluation, model, options.output) for evaluation in evaluations]
    print(result_table(results))
    if options.output is not None:
        write_results(options.output, checkpoint, results)
        logger.info("results and records are in %s", options.output)
    return 1 if any(result.error for result in results) else 0


def _source(text: str) -> DataSource:
    """The set that --perplexity names: [NAME=]PATH; if the whole text is an existing path, it is the path."""
    name, _, path = ("", "", text) if Path(text).exists() else text.rpartition("=")
    if not path:
        raise UserError(f"--perplexity {text}: needs a path, after NAME= if it is to have a name")
    return DataSource(path=path, name=name)


def _register(folder: Path, checkpoint: Path) -> int:
    found = find_checkpoint(checkpoint, "--checkpoint")

    from titan_peer.checkpoint.inference import require_sound_model
    from titan_peer.evaluation.openai_evals import PREFIX, write_registry

    require_sound_model(found)
    file = write_registry(folder, checkpoint)
    logger.info("wrote %s", file)
    name = PREFIX + checkpoint.as_posix().strip("/")
    elsewhere = "" if folder == Path.home() / ".evals" else f" --registry_path {folder}"
    logger.info("use it with: OPENAI_API_KEY=unused oaieval%s %s test-match", elsewhere, name)
    return 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made ({error.strerror})") from None
