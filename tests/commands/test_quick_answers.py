"""Help and mistakes are answered without loading torch, numpy or matplotlib, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from titan_peer.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "matplotlib", "tokenizers", "transformers", "triton")

JOB, NO_JOB = ["--job.config_file", "train_configs/debug_model.toml"], ["--job.config_file", "no/such.toml"]
AXES = ["--axes", "expert_count"]
TAKE_A_JOB = {"train": [], "estimate": [], "analyze": [], "ablate": AXES, "data inspect": [], "tune": []}
"""Command: the arguments that it needs besides a job."""
TAKE_A_CHECKPOINT = {
    "analyze": JOB,
    "experts": ["--data", "assets/sample_text/validation.jsonl"],
    "eval": ["--evals", "test-match"],
    "generate": ["--prompt", "x"],
    "export": ["--output", "outputs/none"],
    "merge": ["--output", "outputs/none", "--last", "1"],
}
"""Command: the arguments that it needs besides a checkpoint."""
OTHERS_NEED = {
    "import": ["--output", "outputs/none"],
    "data tokenize": ["--output", "outputs/none", "--source.path", "x.txt"],
    "data train-tokenizer": ["--output", "outputs/none", "--source.path", "x.txt"],
}


class Case(NamedTuple):
    name: str
    words: list[str]
    status: int
    message: str
    """A pattern in the output."""


def cases() -> list[Case]:
    found = [
        Case("help", ["--help"], 0, "usage: titan-peer COMMAND"),
        Case("version", ["--version"], 0, "titan_peer "),
        Case("help of a group", ["data", "--help"], 0, "usage: titan-peer data COMMAND"),
        Case("no such command", ["trian"], 2, "no command 'trian'"),
    ]
    found += [Case(f"{name}: help", [*name.split(), "--help"], 0, "usage: ") for name in COMMANDS]
    for name, more in TAKE_A_JOB.items():
        words = [*name.split(), *more]
        found += [
            Case(f"{name}: unknown key", [*words, *JOB, "--training.stepz", "3"], 2, "unknown key --training.stepz"),
            Case(f"{name}: wrong type", [*words, *JOB, "--training.steps", "x"], 2, "training.steps"),
            Case(
                f"{name}: impossible value", [*words, *JOB, "--training.steps", "0"], 2, "training.steps = 0: must be"
            ),
            Case(f"{name}: no config file", [*words, *NO_JOB], 2, "job.config_file = no/such.toml: cannot be read"),
        ]
    for name, more in TAKE_A_CHECKPOINT.items():
        words = [*name.split(), *more]
        found += [
            Case(
                f"{name}: no checkpoint", [*words, "--checkpoint", "no/such"], 2, "--checkpoint no/such: does not exist"
            ),
            Case(
                f"{name}: folder without one", [*words, "--checkpoint", "assets"], 2, "has no complete checkpoint in it"
            ),
        ]
    found.append(Case("import: no folder", ["import", "--input", "no/such", "--output", "x"], 2, "is not a folder"))
    found.append(
        Case("import: no export", ["import", "--input", "assets", "--output", "x"], 2, "config.json: does not exist")
    )
    for name in COMMANDS:
        if name not in TAKE_A_JOB:
            more = TAKE_A_CHECKPOINT.get(name, OTHERS_NEED.get(name, []))
            needed = ["--checkpoint", "x"] if name in TAKE_A_CHECKPOINT else []
            known = needed or more or name == "tune"  # other commands may first say which flags they need
            words = [*name.split(), *more, *needed, "--no_such", "1"]
            found.append(Case(f"{name}: unknown flag", words, 2, "no_such" if known else "error: "))
    return found


# Each case runs in a separate process, forked from one that has imported only the entry point.
PROGRAM = """
import json, os, sys, tempfile
from titan_peer.commands.main import main
heavy, words = json.load(sys.stdin)
answers = []
for arguments in words:
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as loaded:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(printed.fileno(), stream)
            try:
                status = main(arguments)
            except SystemExit as stop:
                status = stop.code
            sys.stdout.flush()
            sys.stderr.flush()
            loaded.write(json.dumps([name for name in heavy if name in sys.modules]).encode())
            loaded.flush()
            os._exit(status or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0), loaded.seek(0)
        answers.append([status, json.load(loaded), printed.read().decode()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, list[str], str]]:
    """Case -> exit status, loaded heavy modules, output."""
    given = json.dumps([HEAVY, [case.words for case in cases()]])
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        input=given,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip((case.name for case in cases()), json.loads(done.stdout)))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_help_and_mistakes_are_answered_without_heavy_libraries(case: Case, answers) -> None:
    status, loaded, printed = answers[case.name]
    assert status == case.status, printed
    assert case.message in printed
    assert not loaded


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--help"], 0, "--training.steps"),
        ([*JOB, "--training.stepz", "3"], 2, "error: command line: unknown key --training.stepz"),
        ([*JOB, "--training.steps", "0"], 2, "error: training.steps = 0: must be"),
        (NO_JOB, 2, "error: job.config_file = no/such.toml: cannot be read"),
    ],
)
def test_the_launcher_of_several_processes_answers_likewise(words: list[str], status: int, message: str) -> None:
    program = "import sys; from titan_peer.distributed.launch import answer_without_processes as answer\n"
    program += "try:\n    status = answer(sys.argv[1:])\nexcept SystemExit as stop:\n    status = stop.code\n"
    program += f"assert not set({HEAVY}) & set(sys.modules)\nsys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout
    assert message in done.stdout
