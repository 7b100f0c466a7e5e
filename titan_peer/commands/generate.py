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
from typing import Annotated, Literal

import torch
import tyro

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.characters import lacking_encoding, read_standard_input, require_whole
from titan_peer.common.command_line import parse_options
from titan_peer.common.errors import UserError
from titan_peer.inference.generator import Completion, Generator, SamplingParams
from titan_peer.model import Experts, Transformer

logger = logging.getLogger("titan_peer")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


_DESCRIPTION = """Complete prompts with a trained model.

Examples:
  titan-peer generate --checkpoint outputs/debug_model --prompt "In the beginning" --seed 1
  titan-peer generate --checkpoint outputs/debug_model --interactive --temperature 0.8
  titan-peer generate --checkpoint outputs/debug_model --tables mapped --json < prompt.txt"""


@dataclass
class GenerateArgs:
    """What the command is told."""

    checkpoint: Path
    """A job's folder, whose newest checkpoint is taken, or a checkpoint, <job.dump_folder>/checkpoint/step-N."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Text to go on from; may be given several times. Without any, standard input is the prompt."""
    interactive: bool = False
    """Type text, read how the model goes on, type more. /new forgets all, /quit or Ctrl-D ends, Ctrl-C interrupts."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(default_factory=SamplingParams)
    num_samples: int = 1
    """Completions of every prompt."""
    json: bool = False
    """Print one JSON object a completion: prompt, text, finish_reason, token_ids, logprobs, prompt_tokens."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1 ...; auto takes cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is bfloat16 on CUDA and float32 on a CPU."""
    tables: Literal["device", "host", "mapped"] = "device"
    """Where the expert tables are: with the model; in the CPU's memory; or in the checkpoint's file, of which only the rows
    that are used are read, so that a million experts need next to no memory."""
    compile: bool | None = None
    """Compile the decode step; by default on CUDA only."""
    max_batch_size: int = 32
    """Most completions that are made together."""


def load(args: GenerateArgs) -> Generator:
    """The checkpoint's model where the arguments want it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device != "auto":
        device = args.device
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: cannot be used: {str(error).splitlines()[0]}") from None
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    if args.dtype != "auto":
        dtype = _DTYPES[args.dtype]
    start = time.perf_counter()
    checkpoint = find_checkpoint(args.checkpoint, "--checkpoint")
    first = target if args.tables == "device" else torch.device("cpu")
    model, job, tokenizer = load_model_for_inference(
        checkpoint, device=first, dtype=dtype, mmap_tables=args.tables == "mapped"
    )
    if first != target:
        move_all_but_tables(model, target)
    logger.info(
        "%s: %s parameters, %s; loaded in %.1f s",
        checkpoint,
        f"{sum(p.numel() for p in model.parameters()):,}",
        job.job.description or "no description",
        time.perf_counter() - start,
    )
    generator = Generator(model, tokenizer, max_batch_size=args.max_batch_size, compile=args.compile)
    logger.info(generator.decoder.report())
    return generator


def move_all_but_tables(model: Transformer, device: torch.device) -> None:
    tables = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in tables:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = parse_options(GenerateArgs, words, "generate", _DESCRIPTION, nested=False)
    for key in ("num_samples", "max_batch_size"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.interactive:
        if args.prompt or args.json or args.num_samples > 1:
            raise UserError("--interactive: goes with none of --prompt, --json, --num_samples")
        generator = load(args)
        _say_what_the_output_lacks(args.json)
        return converse(generator, args.sampling)
    prompts = [require_whole(prompt, f"--prompt {number}") for number, prompt in enumerate(args.prompt, 1)]
    if not prompts:
        if sys.stdin.isatty():
            raise UserError("give --prompt TEXT, --interactive, or a prompt on standard input")
        prompts = [read_standard_input()]
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    generator = load(args)
    _say_what_the_output_lacks(args.json)
    try:
        write(generator, prompts, args.sampling, as_json=args.json)
    except KeyboardInterrupt:
        print(flush=True)
        logger.info("interrupted")
        return 130
    return 0


def write(generator: Generator, prompts: Sequence[str], sampling: SamplingParams, *, as_json: bool) -> None:
    """Print the completions in the order of the prompts, each as soon as it comes."""
    start, first_token = time.perf_counter(), 0.0
    ready = ["" for _ in prompts]  # text that waits for its turn
    done: dict[int, Completion] = {}
    turn = 0
    for piece in generator.stream(prompts, sampling):
        first_token = first_token or time.perf_counter()
        ready[piece.index] += piece.text
        if piece.completion is not None:
            done[piece.index] = piece.completion
        while turn < len(prompts):
            if not as_json:
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
    """Go on from what is typed, again and again, with all before as context."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    logger.info("type text and press Enter; /new forgets all, /quit ends, Ctrl-C interrupts")
    context: list[int] = []
    for line in _typed_lines():
        if line == "/new":
            context = []
            continue
        if line == "/quit":
            break
        context += generator.tokenizer.encode_batch([line])[0] if context else generator.encode(line)
        room = generator.model.args.max_seq_len - min(sampling.max_new_tokens, generator.model.args.max_seq_len // 2)
        if len(context) > room:
            logger.info("the context is full: its beginning is forgotten")
            context = context[-room:]
        try:
            for piece in generator.stream([context], sampling):
                print(piece.text, end="", flush=True)
                if piece.completion is not None:
                    ids = piece.completion.token_ids
                    context += ids[:-1] if piece.completion.finish_reason == "eos" else ids
        except KeyboardInterrupt:
            logger.info("\ninterrupted; the context is what it was before")
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
