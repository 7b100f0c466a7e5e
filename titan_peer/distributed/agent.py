"""torchrun that exits with the job's exit status and prints no traceback: the part of the launcher that needs torch.

It says which rank failed and how, and restarts all processes as long as `--max-restarts` allows. Otherwise it exits
with the status of the worker that failed first (torchrun itself always exits with 1). SIGTERM and SIGINT are passed on
to the workers, which save and exit on their own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed.launcher.api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError
from torch.distributed.run import get_args_parser, run

from titan_peer.common.errors import FINAL_STATUSES, USER_ERROR_STATUS, UserError
from titan_peer.distributed.rendezvous import check_port

KILLED_AFTER_SECONDS = 20  # torchrun waits 30 for a process that it has sent SIGTERM
SHUTDOWN_SECONDS = 600  # for workers to write their last checkpoint after a signal


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """(rank, failure) that caused the others.

    A killed process comes before those that lost contact with it. Last come those that torchrun itself ended: with
    SIGTERM, or with SIGKILL half a minute later if they hang.
    """
    first = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        rank, failure = item
        was_late = failure.exitcode == -signal.SIGKILL and failure.timestamp - first >= KILLED_AFTER_SECONDS
        kind = 2 if failure.exitcode == -signal.SIGTERM or was_late else 0 if failure.exitcode < 0 else 1
        return kind, failure.timestamp, rank

    return min(failures.items(), key=order)


def describe(rank: int, failure: ProcessFailure) -> str:
    """The failure in one line, for the user."""
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    # the worker's own message, if it could record one (faults.py); `failure.message` wraps it in a call stack
    word = failure.error_file_data.get("message")
    words = f": {word['message']}" if failure.exitcode > 0 and isinstance(word, dict) else ""
    return f"rank {rank} failed first ({how}, process {failure.pid}){words}"


def is_final(failures: dict[int, ProcessFailure]) -> bool:
    """Whether the job would fail in the same way if it were restarted."""
    return any(failure.exitcode in FINAL_STATUSES for failure in failures.values())


def has_said_why(failures: dict[int, ProcessFailure]) -> bool:
    """Whether rank 0 has printed why the job ends, before the launcher ended it because of another rank."""
    return 0 in failures and failures[0].exitcode in FINAL_STATUSES


class Agent(LocalElasticAgent):
    """torchrun's agent. It names the lost rank before a restart, and does not restart a job in vain."""

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

    exit_statuses: list[int] = []  # noqa: RUF012 - of the workers of this process, after the last shutdown


def _status(exitcode: int) -> int:
    return exitcode if exitcode >= 0 else 128 - exitcode


def launch(words: Sequence[str]) -> None:
    """Start the processes that torchrun's arguments describe and wait for their end; exits with the job's status."""
    # The agent logs every failed worker with a traceback; the lines printed here replace these.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    torch.distributed.launcher.api.LocalElasticAgent = Agent  # type: ignore[misc]
    parser = get_args_parser()
    parser.set_defaults(shutdown_timeout=SHUTDOWN_SECONDS)
    options = parser.parse_args(words)
    try:
        options.rdzv_endpoint = check_port(options.rdzv_endpoint, options.nnodes)
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(USER_ERROR_STATUS)  # without waiting for the thread of rendezvous.py
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
