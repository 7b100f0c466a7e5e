"""Settings for all tests: variables that libraries read when they are imported, and how a whole run uses two cores.

`pytest` without names of files or folders runs in two processes (pytest-xdist) where there are two cores and no GPU,
otherwise in one; `-n` sets the number too. Whole files are distributed, those in LONG first, so that both processes end
at about the same time. `scripts/check.sh --fast` leaves LONG out.
"""

import os
from pathlib import Path

from titan_peer.common.cpu_threads import let_waiting_threads_sleep

let_waiting_threads_sleep()

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
LONG = [
    "test_train.py",
    "distributed/test_faults.py",
    "distributed/test_loss_curves.py",
    "evaluation/test_during_training.py",
    "data/test_loader.py",
    "sharing/test_export.py",
    "distributed/test_activation_checkpoint.py",
    "experts/test_expert_usage.py",
    "ablation/test_ablate.py",
    "inference/test_generate.py",
    "test_model.py",
    "sharing/test_transformers.py",
    "data/test_training_on_a_mix.py",
    "test_compile.py",
    "distributed/test_resharding.py",
    "evaluation/test_lm_eval.py",
    "analysis/test_analyze.py",
    "analysis/test_estimate.py",
    "test_docs.py",
    "ops/test_triton.py",
    "ops/test_cpu_build.py",
    "checkpoint/test_checkpoint.py",
    "test_averaged_weights.py",
    "checkpoint/test_merge.py",
    "distributed/test_expert_parallel.py",
    "distributed/test_float8.py",
    "analysis/test_dry_run.py",
    "test_job_life.py",
    "experts/test_expert_remedies.py",
    "evaluation/test_offline_suite.py",
    "evaluation/test_openai_evals.py",
    "evaluation/test_perplexity.py",
    "evaluation/test_command.py",
    "test_padding.py",
    "common/test_cpu_threads.py",
    "data/test_tools.py",
    "data/test_local_files.py",
    "distributed/test_slow_process.py",
    "distributed/test_agreement.py",
    "distributed/test_checkpoint_agreement.py",
]
"""Files whose tests take 5 to 200 seconds of a core, because they train, compile or start processes; the longest
first."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use two processes if no files are named, unless the command line sets their number."""
    options = config.option
    names_files = config.args_source is pytest.Config.ArgsSource.ARGS
    has_two_cores = (os.cpu_count() or 1) >= 2 and not torch.cuda.is_available()
    is_decided = not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None or options.usepdb
    is_decided = is_decided or hasattr(config, "workerinput")  # a worker must not start two more workers
    if has_two_cores and not names_files and not is_decided and not options.collectonly:
        options.numprocesses, options.dist, options.loadscopereorder = 2, "loadfile", False
        options.maxworkerrestart = "0"  # a process that dies ends the run, which would wait for ever for a replacement


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of LONG and put them first."""
    order = {TESTS / name: place for place, name in enumerate(LONG)}
    for item in items:
        if item.path in order:
            item.add_marker("long")
    items.sort(key=lambda item: order.get(item.path, len(order)))
