"""From TOML and the command line to a checked job."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from titan_peer.common.bounds import declared_range
from titan_peer.common.characters import require_whole
from titan_peer.common.command_line import wrapped_for_tyro
from titan_peer.common.errors import Problems, UserError, os_failure
from titan_peer.config import version as config_version
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import JobConfig, check

# --------------------------------------------------------------------------------------------------------------------
# TOML -> dataclasses


def _nearest(word: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(candidates)}"


def _plain(hint: Any) -> Any:
    """A type hint without its range."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def type_name(expected: Any) -> str:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return f"{type_name(args[0])}, {declared_range(expected)}"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is list:
        entries = {int: "whole numbers", str: "strings"}
        allowed = declared_range(expected)
        return f"a list of {entries.get(_plain(args[0]), 'tables')}" + (f", {allowed}" if allowed else "")
    if origin is types.UnionType:
        return " or ".join(type_name(a) for a in args)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(
        expected, str(expected)
    )


def _convert(value: Any, expected: Any, key: str, where: str, left_out: list[str] | None = None) -> Any:
    """`value` from TOML as the type a field expects, or UserError; `left_out` as for `_build`."""
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} = {value!r}: must be a table")
        return _build(typing.cast(type, expected), value, key, where, left_out)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is list and isinstance(value, list):
        return [_convert(item, args[0], f"{key}[{i}]", where, left_out) for i, item in enumerate(value)]
    if origin is Literal and value in args:
        return value
    if origin is types.UnionType:
        for option in args:
            try:
                return _convert(value, option, key, where)
            except UserError:
                continue
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(expected, type) and type(value) is expected:
        return value
    raise UserError(f"{where}: {key} = {value!r}: must be {type_name(expected)}")


def _build(cls: type, table: dict[str, Any], prefix: str, where: str, left_out: list[str] | None = None) -> Any:
    """A dataclass from its table.

    Args:
        left_out: if given, keys that are unknown or have a wrong type are added to it instead of being errors, except
            keys of [model].
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values, problems = {}, Problems()
    for name, value in table.items():
        key, wrong = f"{prefix}.{name}" if prefix else name, Problems()
        with wrong.collected():
            if name not in names:
                raise UserError(f"{where}: unknown key {key} = {value!r}{_nearest(name, names)}")
            values[name] = _convert(value, hints[name], key, where, left_out)
        if wrong.found and left_out is not None and key.split(".")[0] != "model":
            left_out.append(key)
        else:
            problems.found += wrong.found
    problems.refuse()
    try:
        return cls(**values)
    except TypeError as error:  # a field without a default is missing
        raise UserError(f"{where}: {prefix or 'the job'}: {str(error).split('__init__() ')[-1]}") from None


def data_sources(tables: Any, key: str, where: str) -> list[DataSource]:
    """Tables of a TOML file, which `where` names, as data sources.

    Raises:
        UserError: they do not describe data sources.
    """
    return typing.cast(list[DataSource], _convert(tables, list[DataSource], key, where))


def _read_toml(path: str) -> JobConfig:
    try:
        with Path(path).open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise os_failure(f"job.config_file = {path}: cannot be read", error) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"job.config_file = {path}: is not valid TOML: {error}") from None
    config = job_from_table(config_version.migrated(table, path), path)
    if config.job.print_config:
        raise UserError(
            f"{path}: job.print_config = true: is for the command line only, since such a job trains nothing"
        )
    return config


def job_from_table(table: dict[str, Any], where: str, left_out: list[str] | None = None) -> JobConfig:
    """The job of a TOML file's table, which `where` names; values and combinations are not checked.

    Args:
        left_out: if given, keys outside of [model] that are unknown or have a wrong type are added to it and ignored.
    Raises:
        UserError: an unknown key, or a value of a wrong type.
    """
    return typing.cast(JobConfig, _build(JobConfig, table, "", where, left_out))


# --------------------------------------------------------------------------------------------------------------------
# Command line


def leaf_keys(cls: type = JobConfig, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every key of the job with its type and field: ("training.steps", int, Field)."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from leaf_keys(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name], f


def _source_key(key: str) -> str | None:
    """The field of a data source that a key like data.sources.0.path names."""
    match = re.fullmatch(r"(?:data\.sources|validation\.sources|evaluation\.perplexity)\.\d+\.(\w+)", key)
    return match[1] if match else None


def _checked_arguments(args: Sequence[str]) -> list[str]:
    """Command-line arguments with only known keys, and booleans as tyro spells them; `--key=value` is split."""
    types_of = {key: expected for key, expected, _ in leaf_keys()}
    source_types = typing.get_type_hints(DataSource)
    flat: list[str] = []
    for argument in args:
        key, equals, value = argument.partition("=")
        flat += [key, value] if key.startswith("--") and equals else [argument]
        require_whole(
            argument, f"command line: {flat[-2] if len(flat) > 1 else 'the first word'}"
        )  # as config.toml is UTF-8
    checked: list[str] = []
    for i, argument in enumerate(flat):
        if argument in ("-h", "--help") or not argument.startswith("--"):
            checked.append(argument)
            continue
        key = argument[2:].replace("-", "_")
        source_field = _source_key(key)
        expected = source_types.get(source_field) if source_field is not None else types_of.get(key)
        if expected is None:
            raise UserError(f"command line: unknown key --{key}{_nearest(key, list(types_of))}")
        following = flat[i + 1] if i + 1 < len(flat) else "--"
        checked.append("--" + key)
        if expected is bool:
            if following.startswith("--"):
                checked.append("True")  # a bare flag
            elif following.lower() in ("true", "false"):
                flat[i + 1] = following.capitalize()
            else:
                raise UserError(f"command line: {key} = {following!r}: must be true or false")
        elif following.startswith("--") and typing.get_origin(expected) is not list:
            raise UserError(f"command line: --{key} needs a value: {type_name(expected)}")
    return checked


def _config_file(args: Sequence[str]) -> str:
    found = [args[i + 1] for i, argument in enumerate(args[:-1]) if argument == "--job.config_file"]
    return found[-1] if found else ""


def load_config(args: Sequence[str]) -> JobConfig:
    """The job that command-line arguments describe, checked.

    Raises:
        UserError: unknown key, wrong type, impossible value or combination.
        SystemExit: --help (0), or a value of a wrong type on the command line (2), with tyro's message.
    """
    args = _checked_arguments(args)
    config_file = _config_file(args)
    base = _read_toml(config_file) if config_file else JobConfig()
    config = tyro.cli(
        JobConfig,
        args=args,
        default=base,
        prog="run_train.sh",
        description=wrapped_for_tyro(
            "Train the job that a TOML file and the keys below describe.\n\nexample:\n"
            "  ./run_train.sh --job.config_file train_configs/debug_model.toml --training.steps 20 --compile.enable false"
        ),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    check(config)
    return config
