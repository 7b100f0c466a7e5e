"""The way into a training run: `python -m titan_peer.train`, which run_train.sh starts on every process.

It reads the job first and imports the trainer, and torch with it, only for a job that is valid: --help and a mistake in
a key, a value or a path are answered at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence

from titan_peer.common.characters import write_every_character
from titan_peer.common.errors import USER_ERROR_STATUS, TransientError, UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config
from titan_peer.failures import exit_status, is_first_process

logger = logging.getLogger("titan_peer")

USAGE = """usage: titan-peer train --job.config_file FILE [--section.key VALUE ...]
example: titan-peer train --job.config_file train_configs/debug_model.toml --training.steps 20
--help lists all keys"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the job that the arguments describe; the return value is the exit status."""
    _die_with_launcher()
    write_every_character()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    except UserError as error:  # in the launcher's variables, so no process knows whether it is the first
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    arguments = sys.argv[1:] if args is None else args
    if not arguments:
        print(USAGE, file=sys.stderr)
        return USER_ERROR_STATUS
    try:
        config = load_config(arguments)
    except (UserError, TransientError) as error:
        return exit_status(error)
    if config.job.print_config:
        print_config(config)
        return 0
    from titan_peer.trainer import run_job  # imports torch, which takes seconds

    return run_job(config)


def print_config(config: JobConfig) -> None:
    """Print the job as a TOML file that trains it: in UTF-8, as TOML requires, whatever encoding standard output
    has."""
    printed = dataclasses.replace(config, job=dataclasses.replace(config.job, print_config=False))
    sys.stdout.flush()
    sys.stdout.buffer.write(printed.to_toml().encode())
    sys.stdout.buffer.flush()


def _die_with_launcher() -> None:
    """Have the kernel kill this process when the launcher dies, so that no orphan goes on writing checkpoints."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
