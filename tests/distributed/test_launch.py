"""Decisions of the launcher before it starts processes and after one has failed; the variables of run_train.sh."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from titan_peer import train
from titan_peer.common.errors import TransientError, UserError
from titan_peer.distributed import launch
from titan_peer.distributed.agent import has_said_why, is_final
from titan_peer.distributed.launch import trains_nothing
from titan_peer.distributed.rendezvous import _is_rendezvous, check_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another program listens, which is not a rendezvous."""
    with socket.socket() as program:
        program.bind(("", 0))
        program.listen()
        yield program.getsockname()[1]


def test_a_taken_port_is_replaced_on_a_single_machine(taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_port(f"localhost:{taken_port}", "1") == "localhost:0"
    assert f"port {taken_port} is in use; a free one is taken" in capsys.readouterr().err


def test_a_taken_port_is_refused_within_seconds_on_several_machines(taken_port: int) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"port {taken_port} of this machine is in use by another program"):
        check_port(f"localhost:{taken_port}", "2")
    assert time.monotonic() - start < 20


def test_a_rendezvous_that_is_there_is_used() -> None:
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True)
    assert _is_rendezvous("localhost", store.port)
    assert check_port(f"localhost:{store.port}", "2") == f"localhost:{store.port}"


def test_a_free_port_is_left_as_it_is(taken_port: int) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        free = other.getsockname()[1]
    assert check_port(f"localhost:{free}", "2") == f"localhost:{free}"
    assert check_port("localhost:0", "1") == "localhost:0"


@pytest.mark.parametrize("endpoint", ["localhost", "localhost:http", "localhost:70000", ":29500"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(UserError, match=f"RDZV_ENDPOINT = {endpoint}: must be HOST:PORT"):
        check_port(endpoint, "2")


@pytest.mark.parametrize(
    ("statuses", "final", "said"),
    [
        ({0: 3, 1: 3}, True, True),  # the loss is not finite on any of them
        ({0: -15, 1: 3}, True, False),  # rank 0 was ended before it could report it
        ({0: 2, 1: 2}, True, True),
        ({0: -15, 1: 2}, True, False),
        ({0: 1, 1: -9}, False, False),
        ({0: 1, 1: 1}, False, False),
    ],
)
def test_a_job_that_would_end_in_the_same_way_is_not_started_again(statuses, final, said, tmp_path: Path) -> None:
    failures = {rank: ProcessFailure(rank, 1000, status, str(tmp_path / "none")) for rank, status in statuses.items()}
    assert is_final(failures) == final
    assert has_said_why(failures) == said


@pytest.mark.parametrize(
    ("arguments", "nothing"),
    [
        ([], True),
        (["--help"], True),
        (["--job.config_file", "x.toml", "--job.print_config"], True),
        (["--job.print-config", "true", "--training.steps", "3"], True),
        (["--job.print_config=True"], True),
        (["--job.print_config", "false"], False),
        (["--job.config_file", "x.toml"], False),
    ],
)
def test_what_trains_nothing_is_recognised(arguments: list[str], nothing: bool) -> None:
    assert trains_nothing(arguments) == nothing


def test_a_disk_that_fails_while_the_job_is_read_is_left_to_the_processes_which_may_be_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_arguments: list[str]) -> None:
        raise TransientError("job.config_file = x.toml: cannot be read: Input/output error")

    monkeypatch.setattr(launch, "load_config", failing)
    monkeypatch.setattr(train, "load_config", failing)
    assert launch.answer_without_processes(["--job.config_file", "x.toml"]) is None
    assert train.main(["--job.config_file", "x.toml"]) == 1
    assert capsys.readouterr().err == "error: job.config_file = x.toml: cannot be read: Input/output error\n"


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["./run_train.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NGPU": "0"}, "error: NGPU = 0: must be a whole number, at least 1"),
        ({"NGPU": "two"}, "error: NGPU = two: must be a whole number, at least 1"),
        ({"NGPU": "-1"}, "error: NGPU = -1: must be"),
        ({"MAX_RESTARTS": "x"}, "error: MAX_RESTARTS = x: must be a whole number, at least 0"),
        ({"NNODES": "2"}, "error: NNODES = 2: needs RDZV_ENDPOINT"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "error: NODE_RANK = 2: must be less than NNODES = 2"),
        ({"LOG_RANK": "all"}, "error: LOG_RANK = all: must be ranks"),
    ],
)
def test_impossible_variables_are_refused_at_once(environment: dict[str, str], message: str) -> None:
    done = run_train("--job.config_file", "train_configs/debug_model.toml", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


def test_run_train_without_arguments_prints_its_usage() -> None:
    done = run_train()
    assert done.returncode == 2 and done.stdout == ""
    assert "./run_train.sh --job.config_file train_configs/debug_model.toml" in done.stderr
    assert "MAX_RESTARTS" in done.stderr and "--help lists all keys" in done.stderr


def test_several_processes_print_a_job_as_it_is() -> None:
    job = ("--job.config_file", "train_configs/debug_model.toml", "--job.print_config")
    one, two = run_train(*job), run_train(*job, NGPU="2")
    assert one.returncode == two.returncode == 0
    assert one.stdout == two.stdout and 'dump_folder = "outputs/debug_model"' in two.stdout
