"""The command line finds each command, explains itself and reports mistakes."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from titan_peer import cli


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_an_unknown_command_is_an_error_that_lists_the_commands(capsys):
    assert cli.main(["trian"]) == 2
    shown = capsys.readouterr().err
    assert "no command 'trian'" in shown and "train" in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_main_and_its_help_shows_an_example(name):
    assert callable(importlib.import_module(cli.COMMANDS[name][0]).main)
    done = subprocess.run(
        [sys.executable, "-m", "titan_peer.cli", *name.split(), "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "xample" in done.stdout
