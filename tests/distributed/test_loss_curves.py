"""Training on many processes has the losses of training on one: real jobs on real text, the same global batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import losses, train_jobs

GLOBAL_BATCH = 8
JOB = [
    *("--job.config_file", "train_configs/debug_model.toml", "--training.steps", 20, "--metrics.log_freq", 1),
    *("--training.seq_len", 64, "--training.global_batch_size", GLOBAL_BATCH, "--model.n_layers", 2),
    *("--training.mixed_precision_param", "float32", "--validation.enable", "false", "--checkpoint.enable", "false"),
    # Retrieval is a step function of the scores: where the scores of the k-th and the next expert differ by no more
    # than float32 rounding, another order of summation chooses the other one. With PEER in both blocks one such choice
    # in the first changes thirty in the second, and 5e-5 of the loss; with PEER in the last block alone it stays one
    # expert of one token.
    *("--model.n_dense_layers", 1, "--optimizer.lr", 2.5e-4, "--optimizer.name", "adamw"),
    *("--model.embedding_norm", "false", "--model.zero_init_outputs", "false"),  # so slow a rate moves the loss at once
]
PLANS: dict[str, tuple[int, list[object]]] = {
    "1 process": (1, []),
    "FSDP x 2": (2, []),
    "ep 2": (2, ["--parallelism.expert_parallel_degree", 2]),
    "FSDP x 4": (4, []),
    "HSDP 2 x 2": (4, ["--parallelism.data_parallel_replicate_degree", 2]),
    "ep 2 x FSDP 2": (4, ["--parallelism.expert_parallel_degree", 2]),
    "ep 4": (4, ["--parallelism.expert_parallel_degree", 4]),
}


def curves(
    folder: Path, plans: list[str], updates: list[str], compiled: bool, more: Sequence[object] = ()
) -> dict[tuple[str, str], list[float]]:
    """Losses of each plan with each update of the expert tables; `more` are keys of all jobs."""
    for world_size in sorted({PLANS[plan][0] for plan in plans}):
        jobs = []
        for plan in (p for p in plans if PLANS[p][0] == world_size):
            for update in updates:
                batch = ["--training.local_batch_size", GLOBAL_BATCH // world_size]
                settings = ["--optimizer.expert_update", update, "--compile.enable", str(compiled).lower()]
                output = ["--job.dump_folder", folder / f"{plan}, {update}"]
                jobs.append([*JOB, *PLANS[plan][1], *batch, *settings, *output, *more])
        train_jobs(world_size, jobs)
    return {(plan, update): losses(folder / f"{plan}, {update}") for plan in plans for update in updates}


def require_same_curves(found: dict[tuple[str, str], list[float]], fall: float = 0.3) -> None:
    for (plan, update), curve in found.items():
        reference = found["1 process", update]
        assert len(curve) == len(reference) == 20
        assert reference[-1] < reference[0] - fall
        assert curve == pytest.approx(reference, rel=1e-4), f"{plan}, {update}"


def test_two_processes_follow_one(tmp_path: Path) -> None:
    require_same_curves(curves(tmp_path, ["1 process", "FSDP x 2", "ep 2"], ["rowwise"], compiled=True))


def test_two_processes_follow_one_in_bfloat16(tmp_path: Path) -> None:
    """One process and two processes round the same numbers: the first step, with equal weights, has the same loss up to
    float32 rounding. Later steps differ, because each process rounds its gradient of a matrix."""
    shorter = ["--training.steps", 6, "--training.mixed_precision_param", "bfloat16", "--compile.enable", "false"]
    plans = ["1 process", "FSDP x 2", "ep 2"]
    found = curves(tmp_path, plans, ["rowwise"], compiled=False, more=shorter)
    reference = found["1 process", "rowwise"]
    for (plan, _), curve in found.items():
        assert len(curve) == 6
        assert curve[0] == pytest.approx(reference[0], rel=2e-6), plan
        assert curve == pytest.approx(reference, rel=5e-4), plan


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_every_plan_and_update_follows_one_process(compiled: bool, tmp_path: Path) -> None:
    require_same_curves(curves(tmp_path, list(PLANS), ["rowwise", "dense"], compiled))


@pytest.mark.slow
def test_every_plan_of_dense_parameters_follows_one_process_with_muon(tmp_path: Path) -> None:
    plans = ["1 process", "FSDP x 2", "FSDP x 4", "HSDP 2 x 2"]
    settings = ["--optimizer.name", "muon", "--optimizer.muon.normalize_rows", "true"]
    require_same_curves(curves(tmp_path, plans, ["rowwise"], compiled=False, more=settings), fall=0.02)
