"""Every text file that the project reads or writes is UTF-8, whatever the locale of the machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    file for room in ("titan_peer", "scripts", "benchmarks", "tests") for file in (ROOT / room).rglob("*.py")
)
NOT_TEXT = ("os", "gzip", "zipfile", "tarfile", "webbrowser")  # their `open` is another one
STARTS_A_PROCESS = ("run", "Popen", "check_output", "check_call", "call")  # of subprocess


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text: a file's, or a child process's that is started with `text=True`."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    match call.func:
        case ast.Attribute(attr=attribute) | ast.Name(id=attribute) if attribute in STARTS_A_PROCESS:
            values = [named[name] for name in ("text", "universal_newlines") if name in named]
            return any(not (isinstance(value, ast.Constant) and not value.value) for value in values)
        case ast.Attribute(attr="read_text" | "write_text"):
            return True
        case ast.Attribute(value=ast.Name(id=module), attr="open") if module in NOT_TEXT:
            return False
        case ast.Attribute(attr="open"):
            positional = call.args
        case ast.Name(id="open"):
            positional = call.args[1:]
        case _:
            return False
    mode = named.get("mode", positional[0] if positional else ast.Constant("r"))
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def without_encoding(source: str) -> Iterator[int]:
    """Lines of calls that leave the encoding of text to the locale."""
    for node in ast.walk(ast.parse(source)):
        is_meant = isinstance(node, ast.Call) and opens_text(node)
        if is_meant and "encoding" not in {keyword.arg for keyword in node.keywords}:
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text(words)", True),
        ("open(path)", True),
        ("path.open('a')", True),
        ("subprocess.run(command, text=True)", True),
        ("Popen(command, universal_newlines=True)", True),
        ("subprocess.check_output(command, text=wanted)", True),
        ("path.read_text(encoding='utf-8')", False),
        ("subprocess.run(command, text=True, encoding='utf-8')", False),
        ("subprocess.run(command, text=False)", False),
        ("Document(text=True)", False),
        ("record(text='words', number=1)", False),
        ("path.open('rb')", False),
        ("open(path, mode='wb')", False),
        ("os.open(path, os.O_RDONLY)", False),
    ],
)
def test_calls_that_leave_the_encoding_to_the_locale_are_recognised(source: str, found: bool) -> None:
    assert bool(list(without_encoding(source))) == found


def test_no_text_file_has_the_encoding_of_the_locale() -> None:
    places = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in SOURCES
        for line in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not places, 'these need encoding="utf-8"'
