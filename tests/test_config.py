"""The job file, the command line, and the documents that show them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from titan_peer.config import JobConfig, load_config
from titan_peer.errors import UserError
from titan_peer.model import Transformer
from titan_peer.model_size import model_size

ROOT = Path(__file__).resolve().parent.parent
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
    assert JobConfig().to_toml().startswith("[job]")
