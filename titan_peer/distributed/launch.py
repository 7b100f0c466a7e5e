"""The launcher that `run_train.sh` starts for several processes: torchrun with the job's exit status (see agent.py).

It takes torchrun's arguments. The job is checked here first, without torch: a mistake in a key, a value or the config
file is answered at once and starts no process. Arguments that only ask for output (--help, --job.print_config, or none
at all) are answered here, by one process that prints nothing else on standard output.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from titan_peer.common.errors import USER_ERROR_STATUS, TransientError, UserError
from titan_peer.config.parse import load_config

TRAINER = "titan_peer.train"


def trains_nothing(arguments: Sequence[str]) -> bool:
    """Whether the arguments only ask for something to be printed."""
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key in ("-h", "--help"):
            return True
        if key.replace("-", "_") == "__job.print_config":
            value = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
            if value.lower() != "false":
                return True
    return not arguments


def answer_without_processes(arguments: Sequence[str]) -> int | None:
    """Answer arguments that need no other processes; returns the exit status, or None for a job to train.

    Args:
        arguments: the trainer's, as every process would get them.
    """
    if trains_nothing(arguments):
        train = importlib.import_module(TRAINER)  # of a higher floor; the launcher itself does not need it
        status: int = train.main(arguments)
        return status
    try:
        load_config(arguments)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return USER_ERROR_STATUS
    except TransientError:
        pass  # the processes read the job again, and are restarted if that still fails
    return None


def main() -> None:
    words = sys.argv[1:]
    if TRAINER in words:  # tests launch other programs
        status = answer_without_processes(words[words.index(TRAINER) + 1 :])
        if status is not None:
            sys.exit(status)

    from titan_peer.distributed.agent import launch

    launch(words)


if __name__ == "__main__":
    main()
