"""torchrun with the job's exit status and without its traceback: what `run_train.sh` starts for several processes.

Takes torchrun's arguments. It says which rank was lost and how, starts all of them again while `--max-restarts` allows, and
else exits with the status of the worker that failed first (torchrun itself always exits with 1). SIGTERM and SIGINT reach
the workers, which save and end by themselves.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

import torch.distributed.launcher.api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, run

USER_ERROR_STATUS = 2
KILLED_AFTER_SECONDS = 20  # torchrun waits 30 for a process that it has sent SIGTERM
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
    # the worker's own words, where it could leave any (faults.py)
    has_words = isinstance(failure.error_file_data.get("message"), dict)
    words = f": {failure.message}" if failure.exitcode > 0 and has_words else ""
    return f"rank {rank} failed first ({how}, process {failure.pid}){words}"


class Agent(LocalElasticAgent):
    """torchrun's agent; it names the lost rank before a restart, and does not repeat a job that the user must mend."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED and self._remaining_restarts > 0:
            rank, failure = first_failure(result.failures)
            if failure.exitcode == USER_ERROR_STATUS:
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


def main() -> None:
    # The agent logs each failing worker with a traceback of its own; the lines printed here replace it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    torch.distributed.launcher.api.LocalElasticAgent = Agent  # type: ignore[misc]
    parser = get_args_parser()
    parser.set_defaults(shutdown_timeout=SHUTDOWN_SECONDS)
    try:
        run(parser.parse_args())
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if failure.exitcode != USER_ERROR_STATUS:  # those have printed their own message
            print(f"error: {describe(rank, failure)}", file=sys.stderr)
        sys.exit(_status(failure.exitcode))
    except SignalException as stop:
        failed = [status for status in Agent.exit_statuses if status]
        if failed:
            print(f"error: stopped by {stop.sigval.name}, but a worker could not end well", file=sys.stderr)
            sys.exit(_status(failed[0]))
        print(f"stopped by signal {stop.sigval.name}; start again with the same command to resume", file=sys.stderr)


if __name__ == "__main__":
    main()
