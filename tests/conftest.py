"""What holds for all tests: settings that libraries read when they are imported, and how a whole run uses two cores.

`pytest` without names of files or folders runs in two processes (pytest-xdist) where there are two cores and no GPU, otherwise in
one; `-n` decides it too. Files are the units, and those in LONG come first, so that both processes end together.
`scripts/check.sh --fast` leaves LONG out.
"""

import os
from pathlib import Path

from titan_peer.common.cpu_threads import let_waiting_threads_sleep

let_waiting_threads_sleep()

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton's kernels are run by its interpreter where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
LONG = [
    "distributed/test_faults.py",
    "test_train.py",
    "data/test_training_on_a_mix.py",
    "distributed/test_loss_curves.py",
    "evaluation/test_during_training.py",
    "distributed/test_resharding.py",
    "experts/test_expert_usage.py",
    "ablation/test_ablate.py",
    "sharing/test_export.py",
]
"""Files whose tests train, compile or start processes for most of a minute, the longest first."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two processes where no files are named, unless the command line says how many."""
    options = config.option
    names_files = config.args_source is pytest.Config.ArgsSource.ARGS
    has_two_cores = (os.cpu_count() or 1) >= 2 and not torch.cuda.is_available()
    is_decided = not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None or options.usepdb
    if has_two_cores and not names_files and not is_decided and not options.collectonly:
        options.numprocesses, options.dist, options.loadscopereorder = 2, "loadfile", False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of LONG and put them first."""
    order = {TESTS / name: place for place, name in enumerate(LONG)}
    for item in items:
        if item.path in order:
            item.add_marker("long")
    items.sort(key=lambda item: order.get(item.path, len(order)))
