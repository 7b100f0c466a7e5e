"""The job file, the command line, and the documents that show them."""

from __future__ import annotations

import copy
import math
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from titan_peer.analysis.model_size import model_size
from titan_peer.common.bounds import Range, declared_range
from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import JobConfig, check
from titan_peer.config.parse import leaf_keys, load_config
from titan_peer.config.version import CONFIG_VERSION
from titan_peer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.stem)
def test_every_job_parses_and_builds_on_meta(job: Path) -> None:
    config = load_config(["--job.config_file", str(job), "--model.vocab_size", "4096"])
    with torch.device("meta"):
        model = Transformer(config.model)
    size = model_size(model, config.training.seq_len)
    assert size.active_parameters < size.total_parameters
    if job.stem == "peer_small":
        assert 25e6 < size.total_parameters < 35e6


def test_configuration_document_is_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_config_docs import OUTPUT, render

    assert OUTPUT.read_text(encoding="utf-8") == render(), "run python scripts/make_config_docs.py"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstepz = 3", "unknown key training.stepz = 3; did you mean steps?"),
        ('[training]\nsteps = "3"', "training.steps = '3': must be a whole number"),
        ("[compile]\nenable = 1", "compile.enable = 1: must be true or false"),
        ('[model.peer]\ngates = "max"', "model.peer.gates = 'max': must be one of 'softmax', 'sigmoid', 'relu'"),
        ("[model.peer]\nproduct_key_dim = [2, 2.5]", "model.peer.product_key_dim[1] = 2.5: must be a whole number"),
        ("[[data.sources]]\nname = 'x'", "data.sources[0]: missing 1 required"),
        ("training = 3", "training = 3: must be a table"),
        ("[training", "is not valid TOML"),
    ],
)
def test_bad_job_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(["--job.config_file", str(file)])
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_all_wrong_types_and_unknown_keys_of_a_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[training]\nsteps = "3"\nseq_len = 1.5\nstepz = 3\n[compile]\nenable = 1\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(["--job.config_file", str(file)])
    assert [line.removeprefix(f"{file}: ").split(":")[0] for line in str(caught.value).splitlines()] == [
        "training.steps = '3'",
        "training.seq_len = 1.5",
        "unknown key training.stepz = 3; did you mean steps?",
        "compile.enable = 1",
    ]


def test_command_line_overrides_the_file_and_toml_reproduces_the_job(tmp_path: Path) -> None:
    arguments = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable=false"]
    arguments += [
        "--model.peer.product_key_dim",
        "4",
        "8",
        "512",
        "--data.sources.0.name",
        "other",
        "--model.dim",
        "64",
    ]
    arguments += ["--model.peer.query_dim", "96", "--debug.deterministic"]
    config = load_config(arguments)
    assert config.compile.enable is False and config.debug.deterministic is True
    assert config.model.peer.product_key_dim == [4, 8, 512] and config.data.sources[0].name == "other"
    copy = tmp_path / "copy.toml"
    copy.write_text(config.to_toml(), encoding="utf-8")
    again = load_config(["--job.config_file", str(copy)])
    again.job.config_file = config.job.config_file
    assert again == config


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        load_config(["--training.steps", "0", "--optimizer.beta1", "1.5"])
    assert "training.steps = 0: must be at least 1" in str(caught.value)
    assert "optimizer.beta1 = 1.5" in str(caught.value)
    assert "data.sources = []" in str(caught.value)


def test_defaults_are_documented() -> None:
    assert JobConfig().to_toml().startswith(f"config_version = {CONFIG_VERSION}\n\n[job]")


# ---- ranges of numbers


def numeric_keys() -> Iterator[tuple[str, Any, type]]:
    """(key, type hint with its range, int or float) of every number and list of numbers of a job."""
    places = [(key, hint_of(key)) for key, _, _ in leaf_keys()]
    sources = typing.get_type_hints(DataSource, include_extras=True)
    for section in ("data.sources", "validation.sources", "evaluation.perplexity"):
        places += [(f"{section}.0.{name}", hint) for name, hint in sources.items()]
    for key, hint in places:
        kind = bare(hint)
        if kind in (int, float):
            yield key, hint, kind


def bare(hint: Any) -> Any:
    """A type without its range, and without the list around it."""
    while typing.get_origin(hint) in (list, Annotated):
        hint = typing.get_args(hint)[0]
    return hint


def hint_of(key: str) -> Any:
    cls: Any = JobConfig
    *sections, name = key.split(".")
    for section in sections:
        cls = typing.get_type_hints(cls)[section]
    return typing.get_type_hints(cls, include_extras=True)[name]


def set_key(config: JobConfig, key: str, value: Any) -> None:
    *path, name = key.split(".")
    holder: Any = config
    for part in path:
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    old = getattr(holder, name)
    setattr(holder, name, [value] if isinstance(old, list) else value)


NUMERIC = list(numeric_keys())


@pytest.fixture(scope="module")
def debug_job() -> JobConfig:
    """A debug job with one source in every list of sources."""
    config = load_config(["--job.config_file", str(ROOT / "train_configs/debug_model.toml")])
    config.evaluation.perplexity = copy.deepcopy(config.data.sources)
    return config


def test_every_number_of_a_job_declares_its_range() -> None:
    assert len(NUMERIC) > 70
    assert not [key for key, hint, _ in NUMERIC if declared_range(hint) is None], "declare Annotated[..., Range(...)]"


@pytest.mark.parametrize(("key", "hint", "kind"), NUMERIC, ids=[key for key, _, _ in NUMERIC])
def test_numbers_outside_their_range_are_refused_by_name(key: str, hint: Any, kind: type, debug_job: JobConfig) -> None:
    allowed = declared_range(hint)
    assert allowed is not None
    config = copy.deepcopy(debug_job)
    step = 1 if kind is int else 1e-3
    outside = [allowed.low if allowed.above else allowed.low - step, -(2**70)]
    outside += [allowed.high if allowed.below else allowed.high + step] if allowed.high < math.inf else []
    outside += [2**70] if kind is int else [math.nan, math.inf, -math.inf, 1e39]
    outside += [1e-46] if kind is float and allowed.above and allowed.low == 0 else []  # 0 in float32
    shown = key.replace(".0.", "[0].")
    for value in (kind(v) for v in outside if v not in allowed.also):
        set_key(config, key, value)
        with pytest.raises(UserError) as caught:
            check(config)
        assert any(
            line.startswith((f"{shown} = {value}: must", f"{shown}[0] = {value}: must"))
            for line in str(caught.value).split("\n")
        ), (value, str(caught.value))


@pytest.mark.parametrize("key", ["optimizer.eps", "lr_scheduler.decay_ratio", "model.norm_eps"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_impossible_numbers_are_refused_on_the_command_line_and_in_a_file(key: str, value: str, tmp_path: Path) -> None:
    job = ROOT / "train_configs/debug_model.toml"
    section, name = key.split(".")
    (tmp_path / "job.toml").write_text(f"[{section}]\n{name} = {value}\n", encoding="utf-8")
    for arguments in (
        ["--job.config_file", str(job), f"--{key}", value],
        ["--job.config_file", str(tmp_path / "job.toml")],
    ):
        with pytest.raises(UserError, match=rf"{key} = {float(value)}: must be"):
            load_config(arguments)


def test_ranges_say_what_they_allow() -> None:
    said = {
        Range(1): "at least 1",
        Range(0): "not negative",
        Range(0, 1): "from 0 to 1",
        Range(0, 1, below=True): "at least 0 and less than 1",
        Range(0, above=True): "more than 0",
        Range(1, also=(-1,)): "at least 1 or -1",
    }
    for allowed, words in said.items():
        assert str(allowed) == words
    assert Range(0).problem(-2) == "must not be negative" and "finite" in Range(0).problem(math.nan)
