"""`titan-peer analyze`: its numbers compared with the built model, and the files that it writes."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path

import pytest
import torch
import warm_processes

from titan_peer.analysis.analyze import analyze, kv_cache_bytes
from titan_peer.analysis.plots import draw
from titan_peer.commands import main as cli
from titan_peer.config.parse import load_config
from titan_peer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.stem)
def test_totals_are_those_of_the_built_model(job: Path) -> None:
    config = load_config(["--job.config_file", str(job), "--compile.enable", "false"])
    processes = config.parallelism.data_parallel_replicate_degree * max(
        config.parallelism.data_parallel_shard_degree, 1
    )
    analysis = analyze(config, processes)
    with torch.device("meta"):
        model = Transformer(config.model)
    total = sum(p.numel() for p in model.parameters())
    assert analysis.size.total_parameters == total
    for groups in (analysis.by_component(), analysis.by_layer()):
        assert sum(part.total_parameters for part in groups.values()) == total
        assert sum(part.active_parameters for part in groups.values()) == analysis.size.active_parameters


def test_command_writes_tables_numbers_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--output", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    job = ["--job.config_file", "train_configs/peer_small.toml", "--compile.enable", "false"]
    assert cli.main(["analyze", *job, *files]) == 0
    shown = capsys.readouterr().out
    numbers = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    for text in (f"{numbers['total_parameters']:,}", f"{numbers['active_parameters']:,}", "experts", "MHA", "moments"):
        assert text in shown
    assert sum(part["forward_flops"] for part in numbers["components"]) == numbers["forward_flops_per_token"]
    assert (tmp_path / "a.png").stat().st_size > 30_000
    assert cli.main(["analyze", *job, "--json", str(tmp_path / "no" / "a.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_every_axis_of_the_plot_that_has_numbers_says_what_they_are() -> None:
    config = load_config(["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false"])
    parameters, flops, cache, memory = draw(analyze(config, 1)).axes
    assert "parameters" in parameters.get_xlabel()
    assert (flops.get_xlabel(), flops.get_ylabel()) == ("block", "MFLOPs")
    for panel in (cache, memory):  # the bars are labelled instead
        assert not len(panel.get_xticks()) and len(panel.texts) == len(panel.patches)


def test_a_hundred_billion_parameters_are_analysed_without_memory() -> None:
    arguments = ["--job.config_file", "train_configs/peer_1m.toml", "--compile.enable", "false"]
    arguments += ["--model.dim", "1024", "--model.peer.num_experts", str(2**26)]
    arguments += ["--model.peer.product_key_dim", "8192", "8192"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    analysis = analyze(load_config(arguments), 1)
    assert analysis.size.total_parameters > 100e9
    assert analysis.size.active_parameters < 200e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("command", ["analyze", "estimate"])
@pytest.mark.parametrize("flag", ["--world_size", "--world-size"])
def test_a_world_without_processes_is_refused(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--job.config_file", "train_configs/debug_model.toml", flag, "0"]) == 2
    assert "--world_size 0: must be at least 1" in capsys.readouterr().err


def test_cache_is_what_decoding_allocates() -> None:
    args = load_config(["--job.config_file", "train_configs/debug_model.toml"]).model
    cache = kv_cache_bytes(args)
    assert cache["MLA (latent and rotary key)"] == args.n_layers * 2 * (64 + 16)
    assert cache["MHA (4 heads)"] == args.n_layers * 2 * 4 * (48 + 16 + 64)
    assert cache["MQA"] == cache["MHA (4 heads)"] // 4


def test_experts_of_a_checkpoint_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = ["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false"]
    job += ["--training.seq_len", "64", "--training.local_batch_size", "2"]
    run = ["--training.steps", "2", "--validation.enable", "false", "--job.dump_folder", str(tmp_path / "run")]
    done = warm_processes.run(warm_processes.TRAIN, *job, *run)
    assert done.returncode == 0, done.stderr
    checkpoint = ["--checkpoint", str(tmp_path / "run/checkpoint/step-2"), "--tokens", "2000"]
    caplog.set_level(logging.INFO, "titan_peer")
    files = ["--json", str(tmp_path / "a.json"), "--output", str(tmp_path / "a.png")]
    assert cli.main(["analyze", *job, *checkpoint, *files]) == 0
    usage = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["expert_usage"]
    assert len(usage) == 3
    for layer, scalars in enumerate(usage):
        assert 0 < scalars[f"expert_usage/layer_{layer}/share_used"] <= 1
    assert "were asked for" not in caplog.text
    few = tmp_path / "few.txt"
    few.write_text("A few words.", encoding="utf-8")
    text = ["--validation.sources.0.path", str(few)]
    assert cli.main(["analyze", *job, *checkpoint, *text]) == 0
    assert "tokens; --tokens 2,000 were asked for" in caplog.text
    assert cli.main(["analyze", *job, *checkpoint, "--model.dim", "128"]) == 2
    assert "its model.dim = 256, but the job's is 128" in capsys.readouterr().err
