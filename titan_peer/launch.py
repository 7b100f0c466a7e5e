"""torchrun with the job's exit status and without its traceback: what `run_train.sh` starts for several processes.

Takes torchrun's arguments. On a worker's failure it says which rank failed and how, and exits with that worker's status
(torchrun itself always exits with 1). SIGTERM and SIGINT reach the workers, which save and end by themselves.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

USER_ERROR_STATUS = 2


def main() -> None:
    # The agent logs each failing worker with a traceback of its own; the summary below replaces it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR_STATUS:  # those have printed their own message
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            print(f"error: rank {rank} failed first ({how}, process {failure.pid})", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stop:
        print(f"stopped by signal {stop.sigval.name}; start again with the same command to resume", file=sys.stderr)


if __name__ == "__main__":
    main()
