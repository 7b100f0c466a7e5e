"""Experts sharded over processes: the same results as in one process, no whole table on any process, few bytes
exchanged."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_in_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_peer.config.parse import load_config
from titan_peer.distributed.collectives import new_gloo_group, one_gloo_thread
from titan_peer.distributed.expert_parallel import ExpertParallel, ExpertsOverGroup
from titan_peer.distributed.parallelize import apply_expert_parallel
from titan_peer.distributed.row_exchange import exchange_row_gradients, factors_move_fewer_bytes
from titan_peer.distributed.world import init_world
from titan_peer.model import Experts, MLAArgs, ModelArgs, PEERArgs, Transformer
from titan_peer.ops import RowGradients
from titan_peer.trainer import Trainer

N, E, D, T, K = 10, 2, 12, 6, 5  # ten experts on four processes: three on each, one on the last


OnFour = dict[str, list[Any]]
"""The results of each of four processes, by name."""


@pytest.fixture(scope="module")
def on_four() -> OnFour:
    found = run_in_processes(4, _all_questions)
    return {question: [answers[question] for answers in found] for question in found[0]}


def _all_questions() -> dict[str, Any]:
    with one_gloo_thread():
        dist.init_process_group("gloo")
    found = {"compare": _compare_sharded_with_whole(), "exchange": _exchanges(), "traffic": _forward_traffic()}
    found["bfloat16"] = _bfloat16_errors()
    threads = [_gloo_threads()]
    dist.barrier(new_gloo_group(datetime.timedelta(seconds=60)))  # its thread is running and has its name
    found["threads"] = [*threads, _gloo_threads()]
    dist.destroy_process_group()
    return found


def _gloo_threads() -> int:
    """Threads of this process that run collectives of gloo groups."""
    names = [(task / "comm").read_text(encoding="utf-8").strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("pt_gloo_runloop")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _experts() -> Experts:
    module = Experts(D, PEERArgs(num_experts=N, expert_hidden_size=E)).double()
    with torch.no_grad():
        module.expert_down.copy_(_random(N, E, D, seed=1))
        module.expert_up.copy_(_random(N, E, D, seed=2))
    return module


def _tokens(world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, indices, gates and output gradient of all processes' tokens."""
    all_tokens = T * world_size
    indices = torch.randint(N, (all_tokens, K), generator=torch.Generator().manual_seed(3))
    return (
        _random(all_tokens, D, seed=4).requires_grad_(),
        indices,
        _random(all_tokens, K, seed=5).requires_grad_(),
        _random(all_tokens, D, seed=6),
    )


def _compare_sharded_with_whole() -> dict[str, float]:
    """Largest difference of outputs and gradients, float64, sharded against whole tables."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    own = slice(rank * T, (rank + 1) * T)

    whole = _experts()
    x, indices, gates, dy = _tokens(world_size)
    y = whole(x, indices, gates)
    y.backward(dy)

    sharded = _experts()
    parallelize_module(sharded, mesh, ExpertParallel())
    assert isinstance(sharded.plan.operator, ExpertsOverGroup) and isinstance(sharded.expert_up, DTensor)
    assert sharded.expert_up.shape == (N, E, D) and sharded.expert_up.to_local().shape[0] in (3, 1)
    own_x, own_gates = x.detach()[own].requires_grad_(), gates.detach()[own].requires_grad_()
    own_y = sharded(own_x, indices[own], own_gates)
    own_y.backward(dy[own])

    assert x.grad is not None and gates.grad is not None
    found = {
        "y": (own_y - y[own]).abs().max().item(),
        "dx": (own_x.grad - x.grad[own]).abs().max().item(),
        "dgates": (own_gates.grad - gates.grad[own]).abs().max().item(),
    }
    for name in ("expert_down", "expert_up"):
        gradient = getattr(sharded, name).grad.full_tensor()
        found[f"d{name}"] = (gradient - getattr(whole, name).grad).abs().max().item()
    return found


def test_sharded_experts_compute_what_whole_ones_do(on_four: OnFour) -> None:
    for found in on_four["compare"]:
        assert found.keys() == {"y", "dx", "dgates", "dexpert_down", "dexpert_up"}
        assert max(found.values()) < 1e-12, found


def _bfloat16_errors() -> dict[str, list[float]]:
    """The errors, compared with float64, of outputs and input gradients of bfloat16 tokens with whole and sharded
    tables."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    own = slice(rank * T, (rank + 1) * T)
    x, indices, gates, dy = _tokens(world_size)
    x, gates, dy = x.detach().bfloat16(), gates.detach().float(), dy.bfloat16()
    results = []
    for kind in ("exact", "whole", "sharded"):
        experts = _experts() if kind == "exact" else _experts().float()
        if kind == "sharded":
            parallelize_module(experts, mesh, ExpertParallel())
        own_x, own_gates = (x.double(), gates.double()) if kind == "exact" else (x, gates)
        own_x = own_x[own].requires_grad_()
        y = experts(own_x, indices[own], own_gates[own])
        (dx,) = torch.autograd.grad(y, own_x, dy[own].to(y.dtype))
        assert kind == "exact" or y.dtype == dx.dtype == torch.bfloat16
        results.append((y.detach().double(), dx.double()))
    exact = results[0]
    return {
        name: [((result[i] - exact[i]).norm() / exact[i].norm()).item() for result in results[1:]]
        for i, name in enumerate(("y", "dx"))
    }


def test_parts_of_bfloat16_sums_are_added_in_float32(on_four: OnFour) -> None:
    for found in on_four["bfloat16"]:
        for name, (whole, sharded) in found.items():
            assert 1e-4 < whole < 3e-3, (name, whole)  # one rounding to bfloat16
            assert sharded == pytest.approx(whole, rel=0.02), name


def _exchange(num_experts: int, tokens: int, absent: bool) -> tuple[bool, float, bool]:
    """Whether factors were gathered, the largest error of the exchanged gradient, and whether all have the same
    bits."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(7)
    down, up = torch.zeros(num_experts, E, D), torch.zeros(num_experts, E, D)
    expected = [torch.zeros(num_experts, E, D, dtype=torch.float64) for _ in range(2)]
    collector = RowGradients(down, up)
    for owner in range(world_size):
        indices = torch.randint(-4 if absent else 0, num_experts, (tokens, K), generator=generator)
        dz, hidden, x, dy = (torch.randn(tokens, *s, generator=generator) for s in ((K, E), (K, E), (D,), (D,)))
        for table, weights, vectors in zip(expected, (dz, hidden), (x, dy)):
            for t in range(tokens):
                for j in range(K):
                    if indices[t, j] >= 0:
                        table[indices[t, j]] += weights[t, j].double()[:, None] * vectors[t].double()
        if owner == rank:
            collector.record(indices.clamp_min(-1), dz, hidden, x, dy)
    group = dist.group.WORLD
    assert group is not None
    exchange_row_gradients([collector], group, compact=absent)
    gathered = collector.factors()[0].shape[0] == tokens * world_size and collector.factors()[0].shape[1] > 1
    rows = [torch.zeros_like(down), torch.zeros_like(up)]
    collector.write_dense("down", rows[0])
    collector.write_dense("up", rows[1])
    error = max((row - table).abs().max().item() for row, table in zip(rows, expected))
    assert collector.norm_squared().item() == pytest.approx(sum(t.square().sum().item() for t in expected), rel=1e-5)
    first = torch.cat([r.flatten() for r in rows])
    others = first.clone()
    dist.broadcast(others, 0)
    return gathered, error, bool((first == others).all())


def _exchanges() -> list[tuple[bool, float, bool]]:
    return [_exchange(400, 3, False), _exchange(400, 3, True), _exchange(8, 40, False), _exchange(8, 40, True)]


def test_table_gradients_are_summed_as_factors_or_dense_whichever_is_smaller(on_four: OnFour) -> None:
    for cases in on_four["exchange"]:
        assert [gathered for gathered, _, _ in cases] == [True, True, False, False]
        assert max(error for _, error, _ in cases) < 1e-4
        assert all(same_bits for _, _, same_bits in cases)


def test_choice_between_factors_and_dense_counts_the_bytes_a_process_receives() -> None:
    for replicas in (2, 3, 16):
        for factor, table in ((10, 100), (50, 100), (100, 100), (99, 100), (12, 100)):
            gathered, reduced = (replicas - 1) * factor, 2 * (replicas - 1) / replicas * table
            assert factors_move_fewer_bytes(factor, table, replicas) == (gathered < reduced)


# ---- what is exchanged


class _Collectives(TorchDispatchMode):
    """Elements of every functional collective, by dtype: the larger side of each, that of the whole group."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace.startswith("_c10d_functional") and re.match("all_|reduce_", func.__name__):
            sides = [args[0], *tree_leaves(out)]
            name = f"{func.__name__.split('.')[0]} {args[0].dtype}"
            self.elements[name] = self.elements.get(name, 0) + max(side.numel() for side in sides)
        return out


def _forward_traffic() -> list[dict[str, int]]:
    world_size, tokens, dim = dist.get_world_size(), 64, 32
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    found = []
    for places in (8, 128):
        module = Experts(dim, PEERArgs(num_experts=4096))
        module.init_weights(residual_scale=1.0)
        parallelize_module(module, mesh, ExpertParallel())
        with _Collectives() as counted:
            x, gates = torch.randn(tokens, dim).bfloat16(), torch.rand(tokens, places)
            y = module(x, torch.randint(4096, (tokens, places)), gates)
            assert y.dtype == torch.bfloat16 and y.isfinite().all()
        found.append(counted.elements)
    return found


def test_exchange_is_two_copies_of_the_tokens_whatever_k_is(on_four: OnFour) -> None:
    tokens, dim = 4 * 64, 32
    for found in on_four["traffic"]:
        for elements, places in zip(found, (8, 128)):
            bfloat16 = sum(count for name, count in elements.items() if "bfloat16" in name)
            assert bfloat16 == tokens * dim  # the tokens
            float32 = sum(count for name, count in elements.items() if "float32" in name)
            assert float32 == tokens * dim + tokens * places  # the partial sums, and the gates
            assert sum(elements.values()) - bfloat16 - float32 == tokens * places  # int32 indices


# ---- what is held


def _largest_allocation(arguments: list[str]) -> int:
    """Bytes of the largest allocation while a job is built, trains three steps and saves."""
    config = load_config(arguments)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer = Trainer(config, init_world(config.parallelism))
        trainer.train()
    dist.destroy_process_group()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def _largest_allocations(jobs: list[list[str]], ports: list[int]) -> list[int]:
    found = []
    for job, port in zip(jobs, ports):
        os.environ["MASTER_PORT"] = str(port)
        found.append(_largest_allocation(job))
    return found


def test_no_process_ever_holds_a_whole_table(tmp_path: Path) -> None:
    table_bytes = 16384 * 256 * 4
    job = [
        "--job.config_file",
        "train_configs/debug_model.toml",
        "--training.steps",
        "3",
        "--validation.enable",
        "false",
    ]
    job += ["--training.seq_len", "32", "--training.local_batch_size", "1", "--model.n_layers", "1"]
    job += ["--compile.enable", "false", "--model.tokenizer_path", "byte"]
    jobs = []
    for parts in ("4", "1"):
        for update in ("rowwise", "dense"):
            settings = ["--parallelism.expert_parallel_degree", parts, "--optimizer.expert_update", update]
            jobs.append([*job, *settings, "--job.dump_folder", str(tmp_path / f"{parts}-{update}")])
    for rowwise, dense, whole, whole_dense in run_in_processes(
        4, _largest_allocations, jobs, [free_port() for _ in jobs]
    ):
        assert rowwise == dense == table_bytes // 4
        assert whole == whole_dense == table_bytes  # the result if tables were whole


def test_a_gloo_group_has_one_thread(on_four: OnFour) -> None:
    # With PyTorch's two threads, collectives that end at the same time free one string twice; see
    # distributed/collectives.py.
    assert on_four["threads"] == [[1, 2]] * 4


def test_gloo_groups_use_the_interface_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_one")
    with one_gloo_thread(), pytest.raises(RuntimeError, match="no_such_one"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()


def test_equal_blocks_with_sharded_experts_share_one_compilation() -> None:
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
        peer = PEERArgs(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16)
        mla = MLAArgs(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
        args = ModelArgs(vocab_size=64, dim=32, n_layers=10, n_dense_layers=0, max_seq_len=32, mla=mla, peer=peer)
        with torch.device("meta"):
            model = Transformer(args)
        apply_expert_parallel(model, mesh)
        model.to_empty(device="cpu")
        model.init_weights()
        for block in model.layers:
            block.compile(fullgraph=True)
        tokens = torch.randint(64, (2, 16))
        torch._dynamo.utils.counters.clear()
        for _ in range(2):
            model(tokens, labels=tokens).backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        dist.destroy_process_group()
