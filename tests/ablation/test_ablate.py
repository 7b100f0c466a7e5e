"""Ablations: the plan, comparable designs, and that no run is lost or done twice."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plans import ROOT, plan

from titan_peer.ablation.axes import load_mixes
from titan_peer.ablation.plan import build_plan
from titan_peer.ablation.run import folder_of, prepare, record_end, run_on_cluster, status_of
from titan_peer.ablation.solve import nearest_shape
from titan_peer.analysis.model_size import model_size
from titan_peer.commands.ablate import main as ablate_main
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.model import Transformer


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


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
        (["data_mix"], {}, "name mixes with --custom_datasets FILE"),
        (["training.seq_len=4096"], {}, "training.seq_len = 4096"),
        (["selection_heads=2", "selection_heads=8"], {}, "an axis is named twice"),
        (["selection_heads=2"], {"equal": "flops", "tokens": 8192}, "or more --tokens"),
        (["selection_heads=2"], {"tokens": 100}, "--tokens 100: a step of the base job has 2,048 tokens"),
        (["training.local_batch_size=64"], {"tokens": 8192}, "a step has 16,384 tokens, more than the whole run"),
        (
            ["expert_count=7"],
            {},
            "expert_count=7: cannot be divided over 2 product-key axes of similar size; close to it: 6 (3x2)",
        ),
        (["expert_count=1009"], {}, "close to it: 1,008 (36x28) or 1,012 (44x23)"),
        (
            ["cartesian_dims=3"],
            {"base": ["--model.peer.num_experts", "16129", "--model.peer.product_key_dim", "127", "127"]},
            "num_experts = 16,129 cannot be divided over 3 axes of similar size; give the sizes themselves, as in",
        ),
        (["debug.seed=1,2"], {}, "--axes debug.seed: cannot be varied: give --seeds"),
        (
            ["selection_heads=2"],
            {"base": ["--job.dump_folder", "x"]},
            "--job.dump_folder: cannot be given to an ablation",
        ),
    ],
)
def test_an_impossible_plan_is_refused_before_anything_runs(
    axes: list[str], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        plan(tmp_path, *axes, **options)
    assert message in str(error.value)


def test_numbers_that_are_given_are_met_exactly_and_what_follows_from_them_is_said(tmp_path: Path) -> None:
    found = plan(tmp_path, "expert_count=1000", "cartesian_dims=3,64x16x17", tokens=5000)
    configs = {run.name: run.config for run in found.runs}
    peer = configs["expert_count=1000,seed=0"].model.peer
    assert (peer.num_experts, peer.product_key_dim) == (1000, [40, 25])
    assert all(config.training.steps == 2 for config in configs.values())
    assert found.notes == [
        "--tokens 5,000: 4,096 in 2 steps of 2,048, 0 of them warmup",
        "cartesian_dims = 32x32x16: model.peer.query_dim = 129 instead of 128, which 3 axes do not divide",
        "cartesian_dims = 64x16x17: model.peer.num_experts = 17,408 instead of 16,384; "
        "model.peer.query_dim = 129 instead of 128, which 3 axes do not divide",
    ]


def test_designs_of_other_batches_train_on_the_same_tokens(tmp_path: Path) -> None:
    axes = ["training.local_batch_size=4,32", "training.seq_len=128", "training.steps=50"]
    found = plan(tmp_path, *axes, tokens=409_600)
    tokens = {run.name: run.cost.tokens for run in found.runs}
    assert tokens == {
        "base,seed=0": 409_600,
        "training.local_batch_size=4,seed=0": 409_600,
        "training.local_batch_size=32,seed=0": 409_600,
        "training.seq_len=128,seed=0": 409_600,
        "training.steps=50,seed=0": 50 * 2048,
    }
    warmup = {run.name: run.config.lr_scheduler.warmup_steps for run in found.runs}
    assert list(warmup.values()) == [40, 80, 10, 80, 10]  # a fifth of the steps, as in the base job
    assert (
        "training.local_batch_size = 4: training.steps = 400 instead of 200, for the same number of tokens"
        in found.notes
    )


def test_a_warmup_that_is_varied_stays_what_it_is_where_the_length_of_the_run_follows(tmp_path: Path) -> None:
    axes = ["selection_heads=4,8", "lr_scheduler.warmup_steps=7,30"]
    found = plan(tmp_path, *axes, grid=True, equal="flops", tokens=2_048_000)
    lengths = {run.config.training.steps for run in found.runs}
    assert len(lengths) == 2
    assert [run.config.lr_scheduler.warmup_steps for run in found.runs] == [7, 30, 7, 30]


def test_keys_of_the_command_line_hold_for_the_runs(tmp_path: Path) -> None:
    given = {
        "checkpoint.interval": "3",
        "validation.freq": "4",
        "metrics.log_freq": "5",
        "checkpoint.keep_latest_k": "2",
    }
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    config = plan(tmp_path, "selection_heads=2", base=words).runs[0].config
    found = (
        config.checkpoint.interval,
        config.validation.freq,
        config.metrics.log_freq,
        config.checkpoint.keep_latest_k,
    )
    assert found == (3, 4, 5, 2)


def test_without_seeds_the_base_job_s_own_is_used(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        (ROOT / "train_configs/debug_model.toml").read_text(encoding="utf-8") + "\n[debug]\nseed = 7\n",
        encoding="utf-8",
    )
    found = build_plan(["--job.config_file", str(job)], ["selection_heads=2"], output_dir=tmp_path)
    assert [(run.name, run.config.debug.seed) for run in found.runs] == [
        ("base,seed=7", 7),
        ("selection_heads=2,seed=7", 7),
    ]


@pytest.mark.parametrize("flags", [["--base-config"], ["--base_config"], ["--job.config_file"], ["--job.config-file"]])
def test_old_and_new_spellings_of_flags_mean_the_same(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    dry_run = "--dry-run" if "base" in flags[0] else "--dry_run"
    command = [*flags, "train_configs/debug_model.toml", "--axes", "selection_heads=2", "--tokens", "4096", dry_run]
    assert ablate_main([*command, "--set", "model.dim=128"]) == 0
    first = capsys.readouterr().out
    assert ablate_main([*command, "--model.dim", "128"]) == 0
    assert capsys.readouterr().out == first


def realised(config: JobConfig) -> dict[str, float]:
    """The FLOPs and parameters of a job, from its file alone."""
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
    assert nearest_shape(number, axes) == shape


# --------------------------------------------------------------------------------------------------------------------
# What is on disk, whatever happens


def killed_at_event(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed just before its `number`-th change of a file; returns whether it was
    killed."""
    child = os.fork()
    if child == 0:
        left = number

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_an_ablation_killed_at_any_moment_of_a_run_s_end_has_its_result_or_its_checkpoint(tmp_path: Path) -> None:
    moments = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        checkpoint = folder / "checkpoint" / "step-2"
        checkpoint.mkdir(parents=True)
        files = [checkpoint / name for name in ("train_state.json", "__R_0.distcp", "manifest.json")]
        for file in files:
            file.write_text("state", encoding="utf-8")
        (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n', encoding="utf-8")
        killed = killed_at_event(number, lambda folder=folder: record_end(folder, 2, 0, 1.0, False))  # type: ignore[misc]
        status = folder / "status.json"
        if status.exists():
            assert json.loads(status.read_text(encoding="utf-8"))["state"] == "done"
        else:
            assert all(file.read_text(encoding="utf-8") == "state" for file in files)
        if not killed:
            assert status.exists() and not checkpoint.exists()
            break
        moments += 1
    assert moments >= 5  # the status file, its rename, three files and their folders


def test_an_ablation_killed_at_any_moment_of_its_preparation_goes_on(tmp_path: Path) -> None:
    runs = plan(tmp_path, "selection_heads=2,8", tokens=4096).runs
    for number in itertools.count(1):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        killed = killed_at_event(number, lambda: prepare(runs, resume=False, retry_failed=False))
        again = prepare(runs, resume=True, retry_failed=False)
        assert again == runs
        assert all((folder_of(run) / "job.toml").read_text(encoding="utf-8") == run.config.to_toml() for run in runs)
        if not killed:
            break
    assert number > 6


def test_an_ablation_that_an_earlier_version_began_goes_on_and_one_with_other_settings_does_not(tmp_path: Path) -> None:
    """The jobs of such a plan had no version and lacked newer keys."""
    as_then = ["--optimizer.expert_catch_up", "false"]
    found = plan(tmp_path, "selection_heads=2", tokens=4096, base=as_then)
    prepare(found.runs, resume=False, retry_failed=False)
    for run in found.runs:
        file = folder_of(run) / "job.toml"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        newer = ("config_version", "allow_changed", "expert_catch_up", "expert_lr_factor", "expert_weight_decay")
        old = [line for line in lines if not line.startswith(newer)]
        assert len(old) == len(lines) - len(newer)
        file.write_text("".join(old), encoding="utf-8")
    assert prepare(found.runs, resume=True, retry_failed=False) == found.runs
    other = plan(tmp_path, "selection_heads=2", tokens=4096, base=[*as_then, "--optimizer.lr", "0.002"])
    with pytest.raises(
        UserError, match=r"other settings: this one has optimizer.lr = 0.002 \(was 0.003\); give another"
    ):
        prepare(other.runs, resume=True, retry_failed=False)


def test_a_resumed_ablation_removes_the_checkpoint_that_a_killed_one_left_of_a_done_run(tmp_path: Path) -> None:
    found = plan(tmp_path, "selection_heads=2", tokens=4096)
    prepare(found.runs, resume=False, retry_failed=False)
    left = folder_of(found.runs[0]) / "checkpoint" / "step-2"
    left.mkdir(parents=True)
    (folder_of(found.runs[0]) / "status.json").write_text('{"state": "done"}', encoding="utf-8")
    prepare(found.runs, resume=True, retry_failed=False, keep_checkpoints=True)
    assert left.exists()
    assert prepare(found.runs, resume=True, retry_failed=False) == found.runs[1:]
    assert not left.exists()


TINY = ["compile.enable=false", "training.seq_len=32", "training.local_batch_size=2", "model.n_layers=1"]
TINY += [
    "optimizer.name=adamw",
    "model.zero_init_outputs=false",
    "validation.steps=1",
    "training.max_norm=0",
    "lr_scheduler.warmup_steps=0",
    "model.peer.num_heads=2",
]


def ablate(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "titan_peer.commands.main",
        "ablate",
        "--base-config",
        "train_configs/debug_model.toml",
    ]
    command += ["--axes", "selection_heads=1", "optimizer.lr=1e18", "--set", *TINY, "--tokens", "1024", *more]
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
    deadline = time.monotonic() + 600
    while not (second_run.exists() and second_run.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    base_status = (folder / "runs" / "base,seed=0" / "status.json").stat().st_mtime_ns

    resumed = ablate(folder, "--resume")
    out, err = resumed.communicate(timeout=900)
    assert resumed.returncode == 1, err
    assert "3 runs, 2 to do" in out and "start  base,seed=0" not in out
    assert (folder / "runs" / "base,seed=0" / "status.json").stat().st_mtime_ns == base_status
    for name in ("base,seed=0", "selection_heads=1,seed=0"):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
        assert steps == list(range(1, 17))
        assert not (folder / "runs" / name / "checkpoint").exists()  # a failed run keeps its checkpoints

    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "base,seed=0": "done",
        "selection_heads=1,seed=0": "done",
        "optimizer.lr=1e18,seed=0": "failed",
    }
    assert "loss = nan" in rows["optimizer.lr=1e18,seed=0"]["error"]
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
