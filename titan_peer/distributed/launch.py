"""torchrun with the job's exit status and without its traceback: what `run_train.sh` starts for several processes.

Takes torchrun's arguments. It says which rank was lost and how, starts all of them again while `--max-restarts` allows, and
else exits with the status of the worker that failed first (torchrun itself always exits with 1). SIGTERM and SIGINT reach
the workers, which save and end by themselves. What is no training (--help, --job.print_config, no arguments) is done here, by one
process whose standard output is the answer and nothing else.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
import torch.distributed.launcher.api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError
from torch.distributed.run import get_args_parser, run

from titan_peer.common.errors import FINAL_STATUSES, USER_ERROR_STATUS, UserError

TRAINER = "titan_peer.train"
KILLED_AFTER_SECONDS = 20  # torchrun waits 30 for a process that it has sent SIGTERM
PORT_SECONDS = 5  # for a rendezvous that is there to answer
SHUTDOWN_SECONDS = 600  # that workers have after a signal to write their last checkpoint


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """(rank, failure) that led to the others.

    A killed process comes before those that lost contact with it, and last are those that torchrun itself ended: by SIGTERM,
    and those that hang by SIGKILL half a minute later.
    """
    first = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        rank, failure = item
        was_late = failure.exitcode == -signal.SIGKILL and failure.timestamp - first >= KILLED_AFTER_SECONDS
        kind = 2 if failure.exitcode == -signal.SIGTERM or was_late else 0 if failure.exitcode < 0 else 1
        return kind, failure.timestamp, rank

    return min(failures.items(), key=order)


def describe(rank: int, failure: ProcessFailure) -> str:
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    # the worker's own words, where it could leave any (faults.py); `failure.message` has its call stack around them
    word = failure.error_file_data.get("message")
    words = f": {word['message']}" if failure.exitcode > 0 and isinstance(word, dict) else ""
    return f"rank {rank} failed first ({how}, process {failure.pid}){words}"


def is_final(failures: dict[int, ProcessFailure]) -> bool:
    """Whether the job would end in the same way if it were started again."""
    return any(failure.exitcode in FINAL_STATUSES for failure in failures.values())


def has_said_why(failures: dict[int, ProcessFailure]) -> bool:
    """Whether rank 0 has printed why the job ends, before the launcher ended it because of another."""
    return 0 in failures and failures[0].exitcode in FINAL_STATUSES


class Agent(LocalElasticAgent):
    """torchrun's agent; it names the lost rank before a restart, and does not start a job again that would end in the same way."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED and self._remaining_restarts > 0:
            rank, failure = first_failure(result.failures)
            if is_final(result.failures):
                self._remaining_restarts = 0
            else:
                number = worker_group.spec.max_restarts - self._remaining_restarts + 1
                restart = f"restart {number} of {worker_group.spec.max_restarts} from the newest checkpoint"
                print(f"{describe(rank, failure)}; {restart}", file=sys.stderr, flush=True)
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        context = self._pcontext
        handlers = context.subprocess_handlers.values() if isinstance(context, SubprocessContext) else ()
        Agent.exit_statuses = [handler.proc.returncode for handler in handlers]

    exit_statuses: list[int] = []  # noqa: RUF012 - of this process' workers, after the last shutdown


def _status(exitcode: int) -> int:
    return exitcode if exitcode >= 0 else 128 - exitcode


def check_port(endpoint: str, nodes: str) -> str:
    """The rendezvous endpoint to use: on a single machine a port that is taken is replaced by a free one.

    Raises:
        UserError: the endpoint is none, or its port on this machine is used by something that is no rendezvous.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"RDZV_ENDPOINT = {endpoint}: must be HOST:PORT, with a port from 1 to 65535 (0: any, on one machine)"
        )
    if port == "0" or not _is_this_machine(host) or not _is_taken(int(port)):
        return endpoint
    if nodes == "1":
        print(f"RDZV_ENDPOINT = {endpoint}: port {port} is in use; a free one is taken", file=sys.stderr)
        return "localhost:0"
    if not _is_rendezvous(host, int(port)):
        raise UserError(
            f"RDZV_ENDPOINT = {endpoint}: port {port} of this machine is in use by another program; "
            "give a free port, the same on all machines"
        )
    return endpoint


def _is_rendezvous(host: str, port: int) -> bool:
    """Whether another launcher of the job answers there, as one does that was started before on this machine."""
    answers = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError, OSError):
            dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=PORT_SECONDS))
            answers.set()

    # beside this thread, since it waits far longer than its timeout for a program that says nothing
    threading.Thread(target=ask, daemon=True).start()
    return answers.wait(PORT_SECONDS)


def _is_this_machine(host: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UserError(f"RDZV_ENDPOINT: the host {host} is not known ({error.strerror})") from None
    return any(_can_bind(str(address), 0) for address in addresses)


def _is_taken(port: int) -> bool:
    return not _can_bind("", port)


def _can_bind(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # ports of connections that have just ended are free
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def trains_nothing(arguments: Sequence[str]) -> bool:
    """Whether a job's arguments only ask for something to be printed."""
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key in ("-h", "--help"):
            return True
        if key.replace("-", "_") == "__job.print_config":
            value = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
            if value.lower() != "false":
                return True
    return not arguments


def _print_instead(arguments: list[str]) -> int:
    train = importlib.import_module(TRAINER)  # the launcher itself needs nothing of the model

    status: int = train.main(arguments)
    return status


def main() -> None:
    # The agent logs each failing worker with a traceback of its own; the lines printed here replace it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    torch.distributed.launcher.api.LocalElasticAgent = Agent  # type: ignore[misc]
    parser = get_args_parser()
    parser.set_defaults(shutdown_timeout=SHUTDOWN_SECONDS)
    options = parser.parse_args()
    if options.training_script == TRAINER and trains_nothing(options.training_script_args):
        sys.exit(_print_instead(options.training_script_args))
    try:
        options.rdzv_endpoint = check_port(options.rdzv_endpoint, options.nnodes)
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(USER_ERROR_STATUS)  # without waiting for a question that nobody answers
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if not has_said_why(error.failures):
            print(f"error: {describe(rank, failure)}", file=sys.stderr)
        final = [f.exitcode for f in error.failures.values() if f.exitcode in FINAL_STATUSES]
        sys.exit(final[0] if final else _status(failure.exitcode))
    except RendezvousClosedError:
        print("error: the job has ended on another machine, which says why", file=sys.stderr)
        sys.exit(1)
    except SignalException as stop:
        failed = [status for status in Agent.exit_statuses if status]
        if failed:
            print(f"error: stopped by {stop.sigval.name}, but a worker could not end well", file=sys.stderr)
            sys.exit(_status(failed[0]))
        print(f"stopped by signal {stop.sigval.name}; start again with the same command to resume", file=sys.stderr)


if __name__ == "__main__":
    main()
