"""Ablations: what is planned, that designs are made comparable, and that runs are neither lost nor done twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from titan_peer.ablate import main as ablate_main
from titan_peer.ablation.plan import Plan, build_plan, load_mixes
from titan_peer.ablation.run import folder_of, prepare, run_on_cluster, status_of
from titan_peer.ablation.solve import factorise
from titan_peer.config import JobConfig, load_config
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.errors import UserError
from titan_peer.model import Transformer
from titan_peer.model_size import model_size

ROOT = Path(__file__).resolve().parent.parent
BASE = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml")]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(tmp_path: Path, *axes: str, base: list[str] | None = None, **options: object) -> Plan:
    return build_plan([*BASE, *(base or [])], axes, output_dir=tmp_path, **options)  # type: ignore[arg-type]


def test_one_axis_at_a_time_has_the_base_job_once_and_every_other_value(tmp_path: Path) -> None:
    found = plan(tmp_path, "selection_heads", "expert_count", "optimizer.lr=3e-3,1e-3", seeds=(0, 1), tokens=409_600)
    assert [run.name for run in found.runs if run.seed == 1] == [
        "base,seed=1",
        "selection_heads=2,seed=1",
        "selection_heads=8,seed=1",
        "expert_count=4096,seed=1",
        "expert_count=65536,seed=1",
        "optimizer.lr=1e-3,seed=1",
    ]
    assert found.axes["selection_heads"] == {"2": "selection_heads = 2", "4": "base", "8": "selection_heads = 8"}
    by_name = {run.name: run.config for run in found.runs}
    assert by_name["expert_count=65536,seed=0"].model.peer.product_key_dim == [256, 256]
    assert by_name["optimizer.lr=1e-3,seed=0"].optimizer.lr == 1e-3
    for config in by_name.values():
        assert config.training.steps * 8 * 256 == 409_600
        assert config.lr_scheduler.warmup_steps == 40  # a fifth, as in the base job


def test_a_list_of_the_base_job_is_set_as_in_a_job_file(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.peer.num_experts=65536", "model.peer.product_key_dim=[64,32,32]", "model.peer.query_dim=192"]
    command = [
        "--base-config",
        "train_configs/debug_model.toml",
        "--set",
        *settings,
        "--axes",
        "cartesian_dims=256x256",
    ]
    assert ablate_main([*command, "--dry-run"]) == 0
    assert "cartesian_dims=256x256" in capsys.readouterr().out


def test_a_grid_has_every_combination(tmp_path: Path) -> None:
    found = plan(tmp_path, "cartesian_dims=2,3,64x16x16", "expert_size=1,2", grid=True)
    assert len(found.runs) == 6
    shapes = {tuple(run.config.model.peer.product_key_dim) for run in found.runs}
    assert shapes == {(128, 128), (32, 32, 16), (64, 16, 16)}
    assert {run.config.model.peer.query_dim for run in found.runs} == {128, 129}


def test_data_mixes_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mixes.toml"
    text = (ROOT / "assets/sample_text/train.jsonl").as_posix()
    file.write_text(
        f'[[mixes.once]]\npath = "{text}"\n[[mixes.twice]]\npath = "{text}"\nname = "a"\n', encoding="utf-8"
    )
    file.write_text(
        file.read_text(encoding="utf-8") + f'[[mixes.twice]]\npath = "{text}"\nname = "b"\nweight = 2.0\n',
        encoding="utf-8",
    )
    found = plan(tmp_path, "data_mix", mixes=load_mixes(str(file)))
    assert [run.name for run in found.runs] == ["base,seed=0", "data_mix=once,seed=0", "data_mix=twice,seed=0"]
    assert [source.weight for source in found.runs[2].config.data.sources] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        (["selection_head"], {}, "--axes selection_head: must be one of expert_count"),
        (["optimizer.lr"], {}, "give its values, as in optimizer.lr=A,B"),
        (["selection_heads=two"], {}, "values must be whole numbers"),
        (["cartesian_dims=64y2"], {}, "must be a number of axes, or sub-keys as in 64x16x16"),
        (["data_mix"], {}, "name mixes with --custom-datasets FILE"),
        (["training.seq_len=4096"], {}, "training.seq_len = 4096"),
        (["selection_heads=2", "selection_heads=8"], {}, "an axis is named twice"),
        (["selection_heads=2"], {"equal": "flops", "tokens": 8192}, "or more --tokens"),
    ],
)
def test_an_impossible_plan_is_refused_before_anything_runs(
    axes: list[str], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        plan(tmp_path, *axes, **options)
    assert message in str(error.value)


def realised(config: JobConfig) -> dict[str, float]:
    """What a job costs, from its file alone."""
    config.model.vocab_size = load_tokenizer(config.model.tokenizer_path).vocab_size
    with torch.device("meta"):
        model = Transformer(config.model)
    size = model_size(model, config.training.seq_len)
    tokens = config.training.steps * config.training.local_batch_size * config.training.seq_len
    return {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": size.active_parameters,
        "flops": size.training_flops * tokens,
    }


@pytest.mark.parametrize("equal", ["flops", "total_parameters", "active_parameters"])
def test_designs_are_made_equal_within_two_percent(equal: str, tmp_path: Path) -> None:
    axes = ["selection_heads=2,8", "cartesian_dims=3", "expert_size=4"]
    axes += [] if equal == "total_parameters" else ["expert_count=4096"]
    base = ["--model.n_dense_layers", "1"]
    found = plan(tmp_path, *axes, base=base, tokens=400_000, equal=equal)
    assert prepare(found.runs, resume=False, retry_failed=False) == found.runs
    with pytest.raises(UserError, match="give --resume to go on"):
        prepare(found.runs, resume=False, retry_failed=False)
    costs = []
    for run in found.runs:
        costs.append(realised(load_config(["--job.config_file", str(folder_of(run) / "job.toml")]))[equal])
    assert len(costs) == len(axes) + 2
    assert max(costs) / min(costs) <= 1.02
    unequal = plan(tmp_path, *axes, base=base, tokens=400_000)
    assert max(realised(r.config)[equal] for r in unequal.runs) / costs[0] > 1.02


@pytest.mark.parametrize(
    ("number", "axes", "shape"), [(65536, 2, [256, 256]), (1000, 3, [10, 10, 10]), (30, 2, [6, 5])]
)
def test_expert_counts_become_nearly_equal_axes(number: int, axes: int, shape: list[int]) -> None:
    assert factorise(number, axes) == shape


TINY = ["compile.enable=false", "training.seq_len=32", "training.local_batch_size=2", "model.n_layers=1"]
TINY += ["validation.steps=1", "training.max_norm=0", "lr_scheduler.warmup_steps=0", "model.peer.num_heads=2"]


def ablate(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "titan_peer.cli", "ablate", "--base-config", "train_configs/debug_model.toml"]
    command += ["--axes", "selection_heads=1", "optimizer.lr=1e30", "--set", *TINY, "--tokens", "1024", *more]
    return subprocess.Popen(
        [*command, "--output-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def test_killed_and_resumed_ablation_loses_no_run_and_does_none_twice(tmp_path: Path) -> None:
    folder = tmp_path / "heads and rates"
    first = ablate(folder)
    second_run = folder / "runs" / "selection_heads=1,seed=0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (second_run.exists() and second_run.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    base_status = (folder / "runs" / "base,seed=0" / "status.json").stat().st_mtime_ns

    resumed = ablate(folder, "--resume")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 1, err
    assert "3 runs, 2 to do" in out and "start  base,seed=0" not in out
    assert (folder / "runs" / "base,seed=0" / "status.json").stat().st_mtime_ns == base_status
    for name in ("base,seed=0", "selection_heads=1,seed=0"):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
        assert steps == list(range(1, 17))
        assert not (folder / "runs" / name / "checkpoint").exists()  # a failed run keeps its own, to be looked at

    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "base,seed=0": "done",
        "selection_heads=1,seed=0": "done",
        "optimizer.lr=1e30,seed=0": "failed",
    }
    assert "loss = nan" in rows["optimizer.lr=1e30,seed=0"]["error"]
    best = min((row for row in rows.values() if row["state"] == "done"), key=lambda row: float(row["loss"]))
    summary = (folder / "results.md").read_text(encoding="utf-8")
    point = "base" if best["run"].startswith("base") else "selection_heads = 1"
    assert f"Best: **{point}**, loss {float(best['loss']):.4f}" in summary
    assert "3 runs: 2 done, 1 failed" in summary and "loss = nan" in summary
    for plot in ("loss_curves.png", "loss_scaling.png"):
        assert (folder / plot).stat().st_size > 10_000


@pytest.mark.slow
def test_runs_go_through_submitit(tmp_path: Path) -> None:
    base = [word for setting in TINY for word in ("--" + setting.split("=")[0], setting.split("=")[1])]
    found = plan(tmp_path, "selection_heads=1", base=base, tokens=256)
    told: list[str] = []
    run_on_cluster(
        prepare(found.runs, resume=False, retry_failed=False),
        output_dir=tmp_path,
        processes=1,
        gpus_per_run=0,
        jobs=2,
        keep_checkpoints=False,
        partition="",
        timeout_minutes=10,
        report=told.append,
        cluster="local",
    )
    assert [(status_of(run) or {}).get("state") for run in found.runs] == ["done", "done"]
    assert sum(line.startswith("done") for line in told) == 2
