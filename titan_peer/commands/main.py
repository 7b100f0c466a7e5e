"""`titan-peer COMMAND ...`: finds the command's module and passes it the rest of the line; parsing only.

Every command's module has `main(args: Sequence[str]) -> int`, which returns the exit status and prints its own
`--help`. Modules are imported when their command is called, so that no command needs another's optional libraries.
"""

from __future__ import annotations

import importlib
import logging
import platform
import sys
from collections.abc import Sequence

from titan_peer.common.characters import write_every_character
from titan_peer.common.command_line import wrapped
from titan_peer.common.cpu_threads import let_waiting_threads_sleep
from titan_peer.common.errors import USER_ERROR_STATUS, TransientError, UserError

# command: (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("titan_peer.train", "train a model from a TOML job (run_train.sh starts the same on several processes)"),
    "estimate": ("titan_peer.commands.estimate", "the memory that each process of a job will take"),
    "analyze": (
        "titan_peer.commands.analyze",
        "parameters, FLOPs, cache and memory of a job's model, by layer and component",
    ),
    "ablate": ("titan_peer.commands.ablate", "train variants of a job under equal conditions and say which is best"),
    "experts": ("titan_peer.commands.experts", "which experts a saved model uses on given text, and for which tokens"),
    "eval": ("titan_peer.commands.evaluate", "evaluate a checkpoint: perplexity, OpenAI evals, lm-eval tasks"),
    "generate": ("titan_peer.commands.generate", "complete prompts with a checkpoint, or talk with it"),
    "merge": ("titan_peer.commands.merge", "average checkpoints of a run into one"),
    "export": ("titan_peer.commands.export", "write a checkpoint as a folder that transformers loads"),
    "import": ("titan_peer.commands.import_model", "make a checkpoint of an exported folder"),
    "data inspect": ("titan_peer.commands.data_inspect", "show a job's data: sequences, shares, lengths of documents"),
    "data tokenize": ("titan_peer.commands.data_tokenize", "tokenise a source once, into memory-mapped shards"),
    "data train-tokenizer": (
        "titan_peer.commands.data_train_tokenizer",
        "train a byte-level BPE tokenizer on a source",
    ),
    "tune": ("titan_peer.commands.tune", "measure how the GPU kernels of a job are best launched, and keep the result"),
}


def usage(group: str = "") -> str:
    """What `titan-peer --help` shows, or `titan-peer GROUP --help` for commands of two words."""
    if group:
        rows = [f"  {name:<20}  {summary}" for name, (_, summary) in COMMANDS.items() if name.split()[0] == group]
        text = f"usage: titan-peer {group} COMMAND [--help] ...\n\ncommands:\n%s"
        return wrapped(text % "\n".join(rows))
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    text = """usage: titan-peer COMMAND [--help] ...

commands:
%s

A job's keys are written --section.key, a command's own flags --words_with_underscores; a dash may stand for an underscore.
`titan-peer COMMAND --help` shows a command's flags with examples, `titan-peer --version` the versions.

example:
  titan-peer train --job.config_file train_configs/debug_model.toml --training.steps 20"""
    return wrapped(text % "\n".join(rows))


def versions() -> str:
    """titan_peer's own version and those that its behaviour depends on, in one line."""
    from importlib.metadata import version

    parts = [f"titan_peer {version('titan_peer')}", f"torch {version('torch')}", f"Python {platform.python_version()}"]
    return ", ".join(parts)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit status (2 for bad input)."""
    write_every_character()
    if "torch" not in sys.modules:
        let_waiting_threads_sleep()
    words = list(sys.argv[1:] if args is None else args)
    try:
        return _run(words)
    except (UserError, TransientError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return USER_ERROR_STATUS if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0


def _run(words: Sequence[str]) -> int:
    if words[:1] in (["--version"], ["-V"]):
        print(versions(), flush=True)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr, flush=True)
        return 0 if words else 2
    group = words[0] if words[0] not in COMMANDS and any(name.split()[0] == words[0] for name in COMMANDS) else ""
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(usage(group), file=sys.stdout if len(words) > 1 else sys.stderr, flush=True)
        return 0 if len(words) > 1 else 2
    # the longest name that fits: "data inspect" before "data"
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS and len(words) >= length:
            break
    else:
        print(f"error: no command {' '.join(words[: 1 + bool(group)])!r}\n{usage(group)}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("titan_peer").setLevel(logging.INFO)
    status: int = importlib.import_module(COMMANDS[name][0]).main(words[length:])
    return status


if __name__ == "__main__":
    sys.exit(main())
