"""A job resumes with any number of processes and any split of the experts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import losses, train_jobs

GLOBAL_BATCH = 8
JOB = [
    *("--job.config_file", "train_configs/debug_model.toml", "--training.steps", 30, "--metrics.log_freq", 1),
    *("--training.seq_len", 64, "--training.global_batch_size", GLOBAL_BATCH, "--model.n_layers", 2),
    *("--training.mixed_precision_param", "float32", "--validation.enable", "false", "--compile.enable", "false"),
    *("--checkpoint.interval", 10, "--checkpoint.keep_latest_k", 0),
    *(
        "--model.n_dense_layers",
        1,
        "--optimizer.lr",
        2.5e-4,
        "--optimizer.name",
        "adamw",
    ),  # why: see test_loss_curves.py
    *("--model.embedding_norm", "false", "--model.zero_init_outputs", "false"),
]


def job(folder: Path, world_size: int, parts: int, update: str, *more: object) -> list[object]:
    batch = ["--training.local_batch_size", GLOBAL_BATCH // world_size]
    plan = ["--parallelism.expert_parallel_degree", parts, "--optimizer.expert_update", update]
    return [*JOB, *batch, *plan, "--job.dump_folder", folder, *more]


def continued_from(source: Path, step: int, folder: Path) -> Path:
    """A new output folder whose only checkpoint is that of `step`."""
    name = f"step-{step}"
    shutil.copytree(source / "checkpoint" / name, folder / "checkpoint" / name)
    return folder


MUON = ["--optimizer.name", "muon", "--optimizer.muon.normalize_rows", "true"]


def reshard(tmp_path: Path, update: str, targets: list[tuple[int, int]], *more: object, fall: float = 0.3) -> None:
    """One process until step 30; from its step 10, jobs with each of (processes, parts); from their step 20, one
    process again."""
    one = tmp_path / "one"
    train_jobs(1, [job(one, 1, 1, update, *more)])
    reference = losses(one)
    assert len(reference) == 30 and reference[-1] < reference[0] - fall
    there = {target: continued_from(one, 10, tmp_path / "{}-{}".format(*target)) for target in targets}
    for world_size in sorted({world_size for world_size, _ in targets}):
        chosen = [target for target in targets if target[0] == world_size]
        train_jobs(world_size, [job(there[target], *target, update, *more) for target in chosen])
    back = {t: continued_from(there[t], 20, tmp_path / "{}-{}-back".format(*t)) for t in targets}
    train_jobs(1, [job(folder, 1, 1, update, *more) for folder in back.values()])
    for target in targets:
        assert losses(there[target])[:10] == pytest.approx(reference[10:20], rel=1e-4), f"to {target}"
        assert losses(back[target]) == pytest.approx(reference[20:], rel=1e-4), f"back from {target}"


def test_checkpoint_of_one_process_goes_on_with_four_and_back(tmp_path: Path) -> None:
    reshard(tmp_path, "rowwise", [(4, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("update", ["rowwise", "dense"])
def test_checkpoint_goes_on_with_any_number_of_processes_and_parts(update: str, tmp_path: Path) -> None:
    reshard(tmp_path, update, [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])


@pytest.mark.slow
def test_checkpoint_of_muon_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    reshard(tmp_path, "rowwise", [(2, 1), (4, 2)], *MUON, fall=0.05)


def test_same_processes_go_on_with_the_same_bits(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    shorter = ["--training.steps", 14, "--checkpoint.interval", 7, *MUON]
    train_jobs(2, [job(straight, 2, 2, "rowwise", *shorter)])
    continued_from(straight, 7, resumed)
    train_jobs(2, [job(resumed, 2, 2, "rowwise", *shorter)])
    assert losses(resumed) == losses(straight)[7:]
