"""Processes that start with the libraries imported: forks of a server that has only imported them.

Each is a separate process, as `python -m titan_peer...` would start it, with its own memory, environment, working
folder, output, exit status and signals. Only the imports are saved, about 4 seconds of a core per process. With a GPU,
processes start without a fork, which CUDA does not survive. Tests of what happens before and around
the interpreter (run_train.sh, the launcher, the terminal's encoding, environment variables that libraries read when
they are imported) start `sys.executable`.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
START_METHOD = "spawn" if torch.cuda.is_available() else "forkserver"
PROCESSES = multiprocessing.get_context(START_METHOD)
TRAIN, TITAN_PEER = "titan_peer.train", "titan_peer.commands.main"

multiprocessing.set_forkserver_preload(["titan_peer.trainer", "torch.distributed.checkpoint.format_utils"])


def _become(program: str, arguments: list[str], environment: dict[str, str], folder: str, said: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    try:
        status = importlib.import_module(program).main(arguments)
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter; multiprocessing does not do it for a child
    sys.exit(status)


@dataclass
class Program:
    """A running program, similar to subprocess.Popen; its output can be read at any time."""

    name: str
    arguments: list[str]
    process: BaseProcess
    _folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    def _said(self, name: str) -> str:
        file = Path(self._folder.name) / name
        return file.read_bytes().decode() if file.exists() else ""

    @property
    def stdout(self) -> str:
        return self._said("out")

    @property
    def stderr(self) -> str:
        return self._said("err")

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit status; a program that has not ended in time is killed.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired([self.name, *self.arguments], timeout, self.stdout, self.stderr)
        return self.process.exitcode


def start(program: str, *arguments: object, folder: Path = ROOT, **environment: str) -> Program:
    """Start `main(arguments)` of a module in a separate process; its return value is the exit status."""
    words = list(map(str, arguments))
    said = tempfile.TemporaryDirectory()
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    process = PROCESSES.Process(target=_become, args=(program, words, variables, str(folder), said.name))
    process.start()
    return Program(program, words, process, said)


def run(
    program: str, *arguments: object, timeout: float = 600, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Start a program and wait for its end."""
    started = start(program, *arguments, folder=folder, **environment)
    status = started.wait(timeout)
    return subprocess.CompletedProcess([program, *started.arguments], status, started.stdout, started.stderr)
