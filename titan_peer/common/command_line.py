"""How commands take flags and show help: one rule for all of them.

A job's keys are written `--section.key`, a command's own flags `--words_with_underscores`. A dash is accepted for an
underscore in both, so the spellings of other tools and of earlier versions work. Help is as wide as the terminal.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_PROGRAMS = ("titan-peer", "./run_train.sh")


def with_underscores(args: Sequence[str]) -> list[str]:
    """The arguments with underscores in the names of flags: `--world-size=4` becomes `--world_size=4`."""
    words = []
    for word in args:
        name, equals, value = word.partition("=")
        words.append("--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word)
    return words


def terminal_width() -> int:
    """Columns of help texts; 80 if there is no terminal and COLUMNS is not set."""
    return max(shutil.get_terminal_size().columns - 2, 20)


def wrapped(text: str, width: int | None = None) -> str:
    """A help text with lines of at most `width` columns (the terminal's).

    Consecutive lines without indentation are one paragraph. An indented line stays a separate line; if it is too long,
    an example command is continued after a backslash, as in a shell, and a row of a table is continued below its second
    column.
    """
    width = width or terminal_width()
    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*textwrap.dedent(text).strip("\n").splitlines(), ""]:
        if line and not line[0].isspace():
            paragraph.append(line)
            continue
        if paragraph:
            lines.append(textwrap.fill(" ".join(paragraph), width))
            paragraph = []
        if line.strip().startswith(_PROGRAMS):
            lines += _command_lines(line, width)
        elif line.strip():
            column = re.match(r"\s*\S+(?: \S+)*?(\s{2,})(?=\S)", line)
            indent = column.end() if column and column.end() < width // 2 else len(line) - len(line.lstrip()) + 4
            lines.append(textwrap.fill(line, width, subsequent_indent=" " * indent))
        else:
            lines.append("")
    return "\n".join(lines).strip("\n")


def wrapped_for_tyro(text: str) -> str:
    """The same for a description printed by tyro, which joins lines that begin with a letter; so these are indented."""
    return textwrap.indent(wrapped(text, terminal_width() - 1), " ")


def _command_lines(line: str, width: int) -> Iterator[str]:
    """A command split over several lines; a flag stays on one line with its first value if both fit."""
    words = re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", line)
    parts: list[str] = []
    for word in words:
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    current = line[: len(line) - len(line.lstrip())] + parts[0]
    for part in parts[1:]:
        if len(current) + len(part) + 3 > width:
            yield current + " \\"
            current = " " * 6 + part
        else:
            current += f" {part}"
    yield current


def parse_options(options: type[T], args: Sequence[str], command: str, description: str, *, nested: bool = True) -> T:
    """A command's flags as the dataclass that declares them; spelling and help as for CommandParser.

    Args:
        nested: flags of a nested dataclass are prefixed with its name, as in `--source.path`.
    Raises:
        SystemExit: --help (0), or an invalid flag or value (2), with a message.
    """
    import tyro

    return tyro.cli(
        options,
        args=list(args),
        prog=f"titan-peer {command}",
        description=wrapped_for_tyro(description),
        use_underscores=True,
        config=() if nested else (tyro.conf.OmitArgPrefixes,),
    )


class _HelpFormatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrapped(text, width)


class FlagParser(argparse.ArgumentParser):
    """A parser for flags with underscores or dashes, without abbreviations, with help as wide as the terminal.

    Args:
        description: what the program does; prose, see `wrapped`.
        epilog: further text, examples last.
    """

    def __init__(self, description: str | None, epilog: str = "", prog: str | None = None) -> None:
        super().__init__(
            prog=prog, description=description, epilog=epilog, formatter_class=_HelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        return super().parse_known_args(with_underscores(sys.argv[1:] if args is None else args), namespace)


class CommandParser(FlagParser):
    """The parser of `titan-peer COMMAND`."""

    def __init__(self, command: str, description: str, epilog: str) -> None:
        super().__init__(description, epilog, prog=f"titan-peer {command}")
