"""`titan-peer generate`: the text to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.common.characters import lacking_encoding, read_standard_input, require_whole
from titan_peer.common.command_line import parse_options
from titan_peer.common.errors import Problems, UserError
from titan_peer.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from titan_peer.inference.generator import Completion, Generator

logger = logging.getLogger("titan_peer")


_DESCRIPTION = """Complete prompts with a trained model.

Examples:
  titan-peer generate --checkpoint outputs/debug_model --prompt "In the beginning" --seed 1
  titan-peer generate --checkpoint outputs/debug_model --interactive --temperature 0.8
  titan-peer generate --checkpoint outputs/debug_model --tables mapped --json < prompt.txt"""


@dataclass
class GenerateArgs:
    """The command's flags."""

    checkpoint: Path
    """A job's folder, whose newest checkpoint is taken, or a checkpoint, <job.dump_folder>/checkpoint/step-N."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Text to continue; may be given several times. Without any, standard input is the prompt."""
    interactive: bool = False
    """Type text and read how the model continues it; /new begins a new text, /quit or Ctrl-D ends, Ctrl-C
    interrupts."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(default_factory=SamplingParams)
    num_samples: int = 1
    """Completions per prompt."""
    json: bool = False
    """Print one JSON object per completion: prompt, text, finish_reason, token_ids, logprobs, prompt_tokens."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1 ...; auto takes cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; auto is bfloat16 on CUDA and float32 on a CPU."""
    tables: Literal["device", "host", "mapped"] = "device"
    """Where the expert tables are: with the model; in the CPU's memory; or in the checkpoint's file, of which only the
    rows that are used are read, so that a million experts need hardly any memory."""
    ema: bool = False
    """Take the moving averages of the weights (training.ema_decay) in place of the last weights."""
    compile: bool | None = None
    """Compile the decode step; by default on CUDA only."""
    max_batch_size: int = 32
    """The most completions that are made together."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = parse_options(GenerateArgs, words, "generate", _DESCRIPTION, nested=False)
    problems = Problems()
    for key in ("num_samples", "max_batch_size"):
        problems.add_if(getattr(args, key) < 1, f"--{key} {getattr(args, key)}: must be at least 1")
    for number, prompt in enumerate(args.prompt, 1):
        with problems.collected():
            require_whole(prompt, f"--prompt {number}")
    with_others = args.interactive and (args.prompt or args.json or args.num_samples > 1)
    problems.add_if(bool(with_others), "--interactive: goes with none of --prompt, --json, --num_samples")
    with problems.collected():
        checkpoint = find_checkpoint(args.checkpoint, "--checkpoint")
    problems.refuse()
    prompts = [] if args.interactive else _prompts(args)
    generator = _load(args, checkpoint)
    _say_what_the_output_lacks(args.json)
    if args.interactive:
        return converse(generator, args.sampling)
    try:
        write(generator, prompts, args.sampling, as_json=args.json)
    except KeyboardInterrupt:
        print(flush=True)
        logger.info("interrupted")
        return 130
    return 0


def _prompts(args: GenerateArgs) -> list[str]:
    """Every prompt as often as it is to be completed."""
    prompts = args.prompt
    if not prompts:
        if sys.stdin.isatty():
            raise UserError("give --prompt TEXT, --interactive, or a prompt on standard input")
        prompts = [read_standard_input()]
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def _load(args: GenerateArgs, checkpoint: Path) -> Generator:
    from titan_peer.checkpoint.inference import load_generator

    return load_generator(
        checkpoint,
        device=args.device,
        dtype=args.dtype,
        tables=args.tables,
        max_batch_size=args.max_batch_size,
        compile=args.compile,
        ema=args.ema,
    )


def write(generator: Generator, prompts: Sequence[str], sampling: SamplingParams, *, as_json: bool) -> None:
    """Print the completions in the order of the prompts, each piece as soon as it is its turn."""
    start, first_token = time.perf_counter(), 0.0
    ready = ["" for _ in prompts]  # text that waits until the prompts before it are done
    done: dict[int, Completion] = {}
    turn, announced = 0, 0
    for piece in generator.stream(prompts, sampling):
        first_token = first_token or time.perf_counter()
        ready[piece.index] += piece.text
        if piece.completion is not None:
            done[piece.index] = piece.completion
        while turn < len(prompts):
            if not as_json:
                if turn == announced and len(prompts) > 1 and ready[turn]:
                    logger.info("--- %d of %d, after %s", turn + 1, len(prompts), json.dumps(prompts[turn][-60:]))
                    announced += 1
                print(ready[turn], end="", flush=True)
                ready[turn] = ""
            if turn not in done:
                break
            print(
                json.dumps({"prompt": prompts[turn], **dataclasses.asdict(done[turn])}) if as_json else "", flush=True
            )
            turn += 1
    new = sum(len(c.token_ids) for c in done.values())
    read = sum(c.prompt_tokens for c in done.values())
    seconds = time.perf_counter() - start
    logger.info(
        "%d prompt and %d new tokens in %.2f s, the first after %.2f s", read, new, seconds, first_token - start
    )


def converse(generator: Generator, sampling: SamplingParams) -> int:
    """Answer what is typed, line by line, until the user ends it; returns the exit status."""
    from titan_peer.inference.conversation import Conversation

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    logger.info("type text and press Enter; /new forgets all, /quit ends, Ctrl-C interrupts")
    conversation = Conversation(generator, sampling)
    for line in _typed_lines():
        if line == "/new":
            conversation.forget()
            continue
        if line == "/quit":
            break
        try:
            for text in conversation.reply(line):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            logger.info("\ninterrupted; this reply is not part of the context")
        print(flush=True)
    return 0


def _say_what_the_output_lacks(as_json: bool) -> None:
    encoding = lacking_encoding()
    if encoding and not as_json:
        logger.info(
            "standard output is %s: other characters are written as \\uXXXX; PYTHONIOENCODING=utf-8 writes them",
            encoding,
        )


def _typed_lines() -> Iterator[str]:
    """Lines from the keyboard (with a prompt on standard error) or a pipe, without their line end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = sys.stdin.encoding if sys.stdin.isatty() else "utf-8"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = require_whole(input(), "the line")
        except (EOFError, KeyboardInterrupt):
            return
        except UserError as error:
            logger.error("%s; it is left out", error)
            continue
        if line:
            yield line
