"""A failure on one process ends the job on all processes, immediately and with the reason. Each process has its own
files."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import time
from pathlib import Path

import pytest
from processes import ROOT, free_port, run_in_processes
from small_jobs import SMALL

TIMEOUT_SECONDS = 240  # of a collective; the jobs below end much sooner
JOB = [*SMALL, "--model.tokenizer_path", str(ROOT / "assets/tokenizer"), "--checkpoint.enable", "false"]
JOB += ["--data.sources.0.path", "train.jsonl", "--parallelism.timeout_seconds", str(TIMEOUT_SECONDS)]
JOB += ["--metrics.log_expert_usage", "true", "--metrics.expert_usage_freq", "100"]


def validated(path: str) -> list[str]:
    keys = ["enable", "true", "freq", "1", "local_batch_size", "1", "sources.0.path", path]
    return [f"--validation.{key}" if i % 2 == 0 else key for i, key in enumerate(keys)]


JOBS = {
    "a held-out document": validated("bad.jsonl"),
    "the number of held-out documents": validated("fewer.jsonl"),
    "a held-out file": validated("only_of_rank_0.jsonl"),
    "a document": ["--data.sources.0.path", "bad.jsonl", "--training.steps", "1000"],
    "a disk that fails": ["--data.sources.0.path", "failing.jsonl", "--training.steps", "1000"],
    "the folder of a report": ["--job.dump_folder", "blocked"],
}


def write_files(folder: Path) -> None:
    """Rank 0, which alone opens `blocked/expert_usage`, cannot open it; rank 1 has other documents."""
    good = [json.dumps({"text": f"document {i} has a few words " * 10}) for i in range(60)]
    for rank in (0, 1):
        own = folder / f"rank{rank}"
        (own / "blocked").mkdir(parents=True)
        files = {"train": good, "bad": good, "failing": good, "fewer": good, "only_of_rank_0": good}
        if rank == 0:
            (own / "blocked" / "expert_usage").write_text("a file", encoding="utf-8")
        else:
            del files["only_of_rank_0"]
            files |= {"bad": [*good[:40], '{"text": ', *good[41:]], "fewer": good[:30]}
        for name, lines in files.items():
            (own / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fail_on_this_process() -> None:
    """Reading failing.jsonl fails after the first dozen records."""
    from titan_peer.data.formats import JsonLines

    whole = JsonLines._record

    def record(self: JsonLines, line: bytes, length: int, position: int) -> object:
        if self.path.name == "failing.jsonl" and position > 3000:
            raise OSError(errno.ESTALE, "Stale file handle")
        return whole(self, line, length, position)

    JsonLines._record = record  # type: ignore[method-assign, assignment]


def run_jobs(folder: str, ports: list[int]) -> list[tuple[int, float, str]]:
    """Exit status, seconds and standard error of each job on this process."""
    from titan_peer import train

    os.chdir(Path(folder) / f"rank{os.environ['RANK']}")
    if os.environ["RANK"] == "1":
        fail_on_this_process()
    found = []
    for (name, more), port in zip(JOBS.items(), ports):
        os.environ["MASTER_PORT"] = str(port)
        said, start = io.StringIO(), time.monotonic()
        with contextlib.redirect_stderr(said):
            status = train.main([*JOB, "--job.dump_folder", f"out of {name}", *more])
        found.append((status, time.monotonic() - start, said.getvalue()))
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[int, float, str]]]:
    """How each job ended, by rank."""
    folder = tmp_path_factory.mktemp("agreement")
    write_files(folder)
    by_rank = run_in_processes(2, run_jobs, str(folder), [free_port() for _ in JOBS])
    return [dict(zip(JOBS, found)) for found in by_rank]


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("a held-out document", 2, "bad.jsonl"),
        ("the number of held-out documents", 2, "all processes must see the same files"),
        ("a held-out file", 2, "only_of_rank_0.jsonl"),
        ("a document", 2, "bad.jsonl"),
        ("a disk that fails", 1, "error: failing.jsonl: cannot be read: Stale file handle\n"),
        ("the folder of a report", 2, "blocked/expert_usage: cannot be made"),
    ],
)
def test_what_fails_on_one_process_ends_all_at_once(ends, what: str, status: int, message: str) -> None:
    assert [end[what][0] for end in ends] == [status, status], [end[what][2] for end in ends]
    assert max(end[what][1] for end in ends) < TIMEOUT_SECONDS / 2
    assert message in ends[0][what][2], ends[0][what][2]
