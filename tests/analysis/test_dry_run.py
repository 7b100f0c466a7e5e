"""The memory and traffic of a step on fake tensors, compared with those of real steps."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from titan_peer.analysis.dry_run import StepTrace, fake_world, trace_step
from titan_peer.analysis.tensor_ledger import TensorLedger
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import load_config
from titan_peer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--training.seq_len", "32", "--training.local_batch_size", "2", "--compile.enable", "false"]


def job(name: str, *arguments: str) -> JobConfig:
    return load_config(["--job.config_file", str(ROOT / f"train_configs/{name}.toml"), *arguments])


def on_meta(config: JobConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model)


def traced(config: JobConfig, world_size: int = 1) -> StepTrace:
    with fake_world(config, world_size) as world:
        return trace_step(config, world)


def traffic(trace: StepTrace) -> dict[tuple[str, str], int]:
    """Payload bytes by (mesh dimension, operation)."""
    return {(dim, c.operation): t.payload_bytes for (dim, c), t in trace.traffic.items()}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_ledger_follows_what_is_alive() -> None:
    with TensorLedger() as ledger:
        with ledger.booked_as("a"):
            a = torch.zeros(1000)
            view = a[10:].view(9, 110)
        with ledger.booked_as("b"):
            b = a + 1  # 4000 bytes beside a's
            del b
            c = torch.zeros(500)
        assert ledger.alive == {"a": 4000, "b": 2000}
        assert ledger.peak == {"a": 4000, "b": 4000}
        del a
        assert ledger.alive["a"] == 4000  # the view keeps it
        ledger.book([view], "c")
        assert (ledger.alive["a"], ledger.alive["c"]) == (0, 4000)
        view.untyped_storage().resize_(0)
        assert ledger.alive["c"] == 0
        del view, c
    assert sum(ledger.alive.values()) == 0
    assert ledger.peak_bytes == 8000


def test_parameters_and_moments_are_those_of_the_model() -> None:
    config = job("debug_model", *SMALL, "--optimizer.name", "adamw")
    memory = traced(config).memory
    model = on_meta(config)
    parameters = sum(4 * p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert memory["parameters"] == parameters + buffers
    tables = sum(p.shape[0] for name, p in model.named_parameters() if "experts.expert_" in name)
    last_uses = 4 * tables
    assert memory["moments"] == pytest.approx(2 * parameters + last_uses, rel=1e-5)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_activation_checkpointing_and_batch_show_in_the_activations(compiled: str) -> None:
    def activations(size: str = "4", *arguments: str) -> int:
        """At the peak of the step, which with sequences of this length is inside the blocks."""
        longer = ["--training.seq_len", "256", "--training.local_batch_size", size]
        arguments = (*SMALL, *longer, "--compile.enable", compiled, *arguments)
        return traced(job("debug_model", *arguments)).memory["activations"]

    kept = activations()
    recomputed = activations("4", "--activation_checkpoint.mode", "full")
    assert recomputed < 0.5 * kept
    if compiled == "false":
        by_op = activations("4", "--activation_checkpoint.mode", "selective_op")
        assert recomputed < by_op < kept
        eight, sixteen = (activations(size) for size in ("8", "16"))
        assert sixteen - eight == pytest.approx(2 * (eight - kept), rel=0.05)  # plus weights in the compute dtype


def test_communication_of_a_step_is_what_the_plans_say() -> None:
    config = job("debug_model", *SMALL)
    config.parallelism.expert_parallel_degree = 4
    trace = traced(config, 8)
    sent = traffic(trace)
    model, peer = config.model, config.model.peer
    tokens, places = 64, peer.num_heads * peer.num_experts_per_tok
    element = 2 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else 4
    # of 4 processes: tokens and gates forward, output gradients backward; indices are int32
    gathered = model.n_layers * 4 * tokens * (2 * element * model.dim + (4 + 4) * places)
    assert sent["ep", "all-gather"] == gathered
    # partial sums are added in float32
    scattered = model.n_layers * 4 * tokens * (2 * 4 * model.dim + 4 * places)
    assert sent["ep", "reduce-scatter"] == scattered
    # FSDP splits the first dim into equal parts, for which it pads it
    dense = {
        name: 8 * math.ceil(p.shape[0] / 8) * p[0].numel()
        for name, p in on_meta(config).named_parameters()
        if ".expert_" not in name
    }
    # matrices of blocks in the compute dtype, all else in float32
    is_matrix = {name: name.startswith("layers.") and not re.search("norm|sub_keys", name) for name in dense}
    matrices = sum(count for name, count in dense.items() if is_matrix[name])
    others = sum(dense.values()) - matrices
    # batch-norm statistics of all processes and their numbers of tokens, float32
    moments = model.n_layers * 8 * 3 * peer.num_heads * peer.query_dim
    # float32 gradients once; parameters once in forward, and the matrices of blocks again in backward
    assert sent["dp_shard", "reduce-scatter"] == 4 * (sum(dense.values()) + moments)
    assert sent["dp_shard", "all-gather"] == 2 * element * matrices + 4 * others + 4 * moments
    assert sum(t.calls for (dim, _), t in trace.traffic.items() if dim == "expert_replica") > 0


@pytest.mark.parametrize("replicas", [1, 2])
def test_muon_sends_each_matrix_to_its_owner_and_back_in_bfloat16(replicas: int) -> None:
    plan = ["--parallelism.data_parallel_replicate_degree", str(replicas), "--parallelism.expert_parallel_degree", "2"]
    config = job("debug_model", *SMALL, *plan, "--optimizer.name", "muon")
    adamw = job("debug_model", *SMALL, *plan, "--optimizer.name", "adamw")
    moved, without = traffic(traced(config, 8)), traffic(traced(adamw, 8))
    of_blocks = on_meta(config).layers.named_parameters()
    matrices = [p.numel() for name, p in of_blocks if p.ndim == 2 and not re.search("norm", name)]
    # an owner has its share, up to one matrix; it receives as much and returns it
    assert 4 * sum(matrices) / 8 <= moved["dp_shard", "all-to-all"] <= 4 * (sum(matrices) / 8 + max(matrices))
    assert ("dp_shard", "all-to-all") not in without
    if replicas == 2:  # each replica gives the other its half of each shard
        shared = moved["dp_replicate", "all-gather"] - without.get(("dp_replicate", "all-gather"), 0)
        assert 2 * sum(matrices) / 4 <= shared <= 2 * (sum(matrices) / 4 + 2 * max(matrices))


def test_more_processes_hold_less_each() -> None:
    config = ["--parallelism.expert_parallel_degree", "8"]
    alone, together = traced(job("debug_model", *SMALL)), traced(job("debug_model", *SMALL, *config), 8)
    for kind in ("parameters", "moments"):
        assert together.memory[kind] == pytest.approx(alone.memory[kind] / 8, rel=0.05)


def test_impossible_degrees_are_refused_as_in_a_real_run() -> None:
    config = job("debug_model", "--parallelism.expert_parallel_degree", "3")
    with pytest.raises(UserError, match="expert_parallel_degree = 3: must divide the number of processes, 8"):
        traced(config, 8)
    assert not torch.distributed.is_initialized()


def dry_run(*arguments: str, ngpu: int, nnodes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "NGPU": str(ngpu), "NNODES": str(nnodes)}
    command = ["./run_train.sh", *arguments, "--comm.mode", "fake_backend"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_launcher_starts_one_process_for_a_dry_run_of_many(tmp_path: Path) -> None:
    arguments = [
        "--job.config_file",
        "train_configs/debug_model.toml",
        *SMALL,
        "--job.dump_folder",
        str(tmp_path / "out"),
    ]
    done = dry_run(*arguments, "--parallelism.expert_parallel_degree", "8", ngpu=8, nnodes=2)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 16" in done.stdout and "expert_replica 2  ep 8" in done.stdout
    for word in ("parameters", "moments", "all-gather", "reduce-scatter", "dp_shard"):
        assert word in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peer_1m", "peer_1m_multinode"])
def test_sixty_four_processes_of_a_large_job(name: str) -> None:
    arguments = ["--job.config_file", f"train_configs/{name}.toml", "--parallelism.expert_parallel_degree", "8"]
    nodes = 8 if name.endswith("multinode") else 1
    if nodes > 1:
        arguments += ["--training.global_batch_size", "256", "--parallelism.data_parallel_replicate_degree", "8"]
    start = time.monotonic()
    done = dry_run(*arguments, ngpu=64 // nodes, nnodes=nodes)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 120
    assert "rank 0 of 64" in done.stdout and "ep 8" in done.stdout
