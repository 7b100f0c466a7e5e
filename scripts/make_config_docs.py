"""Write docs/configuration.md from the dataclasses: python scripts/make_config_docs.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from pathlib import Path

from titan_peer.common.command_line import FlagParser
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import type_name

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

This page lists every key of a job. A TOML file sets the keys (`--job.config_file`), and the command line overrides them
(`--training.steps 1000`, `--compile.enable false`, `--model.peer.product_key_dim 256 256`, `--data.sources.0.path FILE`).
On the command line a dash is accepted for an underscore. Commands also have flags of their own, written
`--words_with_underscores`. `python scripts/make_config_docs.py` generates this page from the dataclasses.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for field, below in zip(body, body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return docs


def table(cls: type, prefix: str) -> list[str]:
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    own, nested = [], []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            nested += section(typing.cast(type, hint), f"{prefix}.{field.name}" if prefix else field.name)
            continue
        default: object = "required"
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = type_name(hint)
        own.append(f"| `{prefix}.{field.name}` | `{default!r}` | {shown} | {docs[field.name]} |")
    head = ["| key | default | type | meaning |", "| --- | --- | --- | --- |"] if own else []
    return [*head, *own, *nested]


def section(cls: type, prefix: str) -> list[str]:
    return ["", f"## {prefix}", "", (inspect.getdoc(cls) or "").split("\n")[0], "", *table(cls, prefix)]


def render() -> str:
    lines = [INTRODUCTION, *table(JobConfig, ""), *section(DataSource, "data.sources[i], validation.sources[i]")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FlagParser(__doc__).parse_args()
    OUTPUT.write_text(render(), encoding="utf-8")
