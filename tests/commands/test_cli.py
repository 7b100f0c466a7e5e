"""The command line finds each command, explains itself in one style and reports mistakes."""

from __future__ import annotations

import importlib
import platform
import re
import runpy
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from titan_peer.commands import main as cli
from titan_peer.common.command_line import with_underscores, wrapped

ROOT = Path(__file__).resolve().parents[2]


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_without_a_command_the_usage_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: titan-peer COMMAND" in capsys.readouterr().err


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown == f"titan_peer 0.1.0, torch {torch.__version__}, Python {platform.python_version()}\n"


def test_import_stands_beside_export():
    names = list(cli.COMMANDS)
    assert names.index("import") == names.index("export") + 1


def test_an_unknown_command_is_an_error_that_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    shown = capsys.readouterr().err
    assert "no command 'trian'" in shown and "train" in shown


def test_commands_of_two_words_are_listed_by_their_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: titan-peer data COMMAND")
    listed = re.findall(r"^  (\w.*?)  ", shown, re.MULTILINE)
    assert listed == [name for name in cli.COMMANDS if name.startswith("data ")]
    assert cli.main(["data"]) == 2
    assert capsys.readouterr().err == shown
    assert cli.main(["data", "inspekt"]) == 2
    assert capsys.readouterr().err.splitlines()[:2] == ["error: no command 'data inspekt'", shown.splitlines()[0]]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(cli.COMMANDS[name][0]).main)
    shown = help_of(name, capsys)
    assert "xample" in shown
    program = "./run_train.sh" if name == "train" else f"titan-peer {name}"
    assert program in shown.partition("xample")[2]


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
@pytest.mark.parametrize("width", [60, 100])
def test_help_is_as_wide_as_the_terminal(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    if name:
        shown = help_of(name, capsys)
    else:
        cli.main(["--help"])
        shown = capsys.readouterr().out
    # a word that is longer than the rest of a line gets its own line
    too_long = [line for line in shown.splitlines() if len(line) > width and len(line.rstrip("\\ ").split()) > 2]
    assert not too_long


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_flags_are_written_with_underscores(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", help_of(name, capsys)))
    assert flags >= {"--help"}
    assert not [flag for flag in flags if "-" in flag[2:]]


def test_a_dash_in_a_flag_means_an_underscore_and_values_stay() -> None:
    given = ["--world-size=4-5", "--job.config-file", "a-b.toml", "-h", "--x", "--", "-1"]
    assert with_underscores(given) == ["--world_size=4-5", "--job.config_file", "a-b.toml", "-h", "--x", "--", "-1"]


def test_examples_that_are_continued_are_the_same_command() -> None:
    command = "titan-peer generate --checkpoint outputs/a/b/c/d/step-1 --prompt 'In the beginning' --top_p 0.9 x y"
    text = wrapped(f"Some words of prose\nthat go on.\n\nexample:\n  {command}", 60)
    prose, _, example = text.partition("\n\n")
    assert prose == "Some words of prose that go on."
    lines = example.splitlines()[1:]
    assert all(len(line) <= 60 for line in lines) and len(lines) == 2
    assert " ".join(line.removesuffix("\\").strip() for line in lines) == command


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, "-m", "titan_peer.commands.main", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


PROGRAMS = sorted(
    [*(ROOT / "scripts").glob("*.py"), *(p for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "report")]
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_scripts_and_benchmarks_explain_themselves_and_do_nothing_else(
    program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(program.parent))
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(program), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert not [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", shown) if "-" in flag[2:]]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [str(program), "--no_such_flag"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(program), run_name="__main__")
    assert stop.value.code == 2


def test_a_number_of_experts_that_is_no_square_is_refused_by_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    square_number = importlib.import_module("report").square_number
    assert square_number("65536") == 65536
    with pytest.raises(ArgumentTypeError, match="1000 is not a square number; the nearest are 961 and 1,024"):
        square_number("1000")


MISTAKES = {
    "eval --checkpoint /nowhere --batch_size 0 --limit 0 --perplexity name=": [
        "--checkpoint /nowhere: does not exist",
        "--perplexity name=: needs a path",
        "--batch_size 0: must be at least 1",
        "--limit 0: must be at least 1",
    ],
    "generate --checkpoint /nowhere --interactive --json --num_samples 0": [
        "--num_samples 0: must be at least 1",
        "--interactive: goes with none of",
        "--checkpoint /nowhere: does not exist",
    ],
    "experts --checkpoint /nowhere --data x --tokens 0": [
        "--tokens 0: must be",
        "--checkpoint /nowhere: does not exist",
    ],
    "analyze --checkpoint /nowhere --job.config_file train_configs/debug_model.toml --tokens 0 --training.steps -1": [
        "--tokens 0: must be at least 1",
        "training.steps = -1: must be",
        "--checkpoint /nowhere: does not exist",
    ],
    "estimate --world_size 0 --job.config_file train_configs/debug_model.toml --training.steps -1": [
        "--world_size 0: must be at least 1",
        "training.steps = -1: must be",
    ],
    "data inspect --documents -1 --job.config_file train_configs/debug_model.toml --training.steps -1": [
        "--documents -1: must not be",
        "training.steps = -1: must be",
    ],
    "data tokenize --output x --tokens_per_shard 0": ["--source.path: must be given", "--tokens_per_shard 0: must be"],
    "data train-tokenizer --output x --vocab_size 3": ["--source.path: must be given", "--vocab_size 3: must be"],
    "ablate --job.config_file x --axes gates=relu --gpus 0 --jobs 0 --seeds -1 --retry_failed": [
        "--gpus 0: must be at least 1",
        "--jobs 0: must be at least 1",
        "--seeds -1: must not be negative",
        "--retry_failed: needs --resume",
    ],
}


@pytest.mark.parametrize("command", MISTAKES)
def test_all_mistakes_in_a_commands_flags_are_reported_at_once(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err.splitlines()
    for line, expected in zip(said, MISTAKES[command], strict=True):
        assert line.startswith(f"error: {expected}"), said


@pytest.mark.parametrize(("name", "value"), [("RANK", ""), ("RANK", "x"), ("WORLD_SIZE", "two")])
def test_launcher_variables_that_are_no_numbers_are_named(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert cli.main(["train", "--job.config_file", "train_configs/debug_model.toml", "--job.print_config"]) == 2
    assert f"error: {name} = {value}: must be a whole number" in capsys.readouterr().err
