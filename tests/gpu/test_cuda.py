"""Tests that need a GPU. On a GPU, the sweep of the kernels over shapes in tests/ops/test_triton.py runs there too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from titan_peer.analysis.kernel_tuning import gpu_milliseconds, tune
from titan_peer.config.parse import load_config
from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer, experts_of
from titan_peer.ops import RowGradients, backend_report, peer_experts, product_key_retrieve, reference, rowwise_adamw_
from titan_peer.ops import triton as kernels
from titan_peer.ops.triton import tuning
from titan_peer.optim.rowwise import RowwiseAdamW

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda")
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
ADAMW |= {"bias_correction1": 0.1, "bias_correction2": 0.05}


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


def test_triton_serves_the_gpu() -> None:
    assert "Triton" in backend_report(DEVICE)


def large_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """T = 1000 tokens, K = 64 of N = 50,000 experts, E = 2, D = 768; some places absent, one expert in every token."""
    T, K, N, E, D = 1000, 64, 50_000, 2, 768
    indices = torch.randint(-1, N, (T, K))
    indices[:, 0] = 7
    x, dy, gates = torch.randn(T, D, dtype=dtype), torch.randn(T, D, dtype=dtype), torch.rand(T, K)
    return x, indices, gates, torch.randn(N, E, D, dtype=dtype), torch.randn(N, E, D, dtype=dtype), dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_shapes_equal_float64(dtype: torch.dtype) -> None:
    x, indices, gates, down, up, dy = large_inputs(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    y, z = kernels.peer_forward(x, indices, gates, down, up, "gelu")
    wide = [t.double() for t in (x, gates, down, up, dy)]
    y64, z64 = reference.peer_forward(wide[0], indices, wide[1], wide[2], wide[3], "gelu")
    ours = (y, z, *kernels.peer_backward(dy, x, indices, gates, z, down, up, "gelu"))
    theirs = (y64, z64, *reference.peer_backward(wide[4], wide[0], indices, wide[1], z64, wide[2], wide[3], "gelu"))
    for our, their in zip(ours, theirs):
        assert (our.double() - their).norm() / their.norm() < tolerance
    pairs, known = kernels.sort_pairs(indices, down.shape[0]), reference.sort_pairs(indices, down.shape[0])
    assert int(pairs.num_rows) == known.row_ids.numel()
    gradient, expected = torch.zeros_like(down, dtype=torch.float32), torch.zeros_like(wide[2])
    kernels.table_gradient(pairs, ours[4], x, gradient)
    reference.table_gradient(known, theirs[4], wide[0], expected)
    assert (gradient.double() - expected).norm() / expected.norm() < tolerance
    norm = kernels.row_norm_squared(pairs, ours[4], x).item()
    assert norm == pytest.approx(expected.square().sum().item(), rel=2 * tolerance)


def test_a_table_of_more_than_two_to_the_31_numbers_is_addressed_right() -> None:
    N, D = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 4 * N * D * 2:
        pytest.skip("needs 18 GB of free GPU memory")
    down = torch.empty(N, 1, D, dtype=torch.bfloat16)
    down.normal_()
    indices = torch.tensor([[N - 1, 0], [N - 2, N - 1]])
    x, gates = torch.randn(2, D, dtype=torch.bfloat16), torch.rand(2, 2)
    y, _ = kernels.peer_forward(x, indices, gates, down, down, "silu")
    few = down[indices.flatten()].double()
    exact, _ = reference.peer_forward(x.double(), torch.arange(4).view(2, 2), gates.double(), few, few, "silu")
    assert (y.double() - exact).norm() / exact.norm() < 1e-2
    pairs, before = kernels.sort_pairs(indices, N), down[N - 1].clone()
    state = (torch.zeros_like(down), torch.zeros(N))
    rowwise_adamw_(down, *state, pairs, torch.ones(2, 2, 1), x, **ADAMW, seed=1)
    assert not torch.equal(down[N - 1], before) and state[1].count_nonzero() == 3


def test_retrieval_of_a_million_experts_equals_float64() -> None:
    T, H, k = 300, 8, 16
    queries = torch.randn(T, H, 256).bfloat16()
    sub_keys = [torch.randn(H, 1024, 128).bfloat16() for _ in range(2)]
    values, indices = kernels.retrieve_forward(queries, sub_keys, k)
    exact, exact_indices = reference.retrieve_forward(queries.double(), [s.double() for s in sub_keys], k)
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-3)
    assert (indices == exact_indices).float().mean() > 0.999


def test_the_host_never_waits_in_a_step_of_the_operators() -> None:
    N, D = 4096, 64
    down, up = torch.randn(N, 1, D, requires_grad=True), torch.randn(N, 1, D, requires_grad=True)
    collector = RowGradients(down.data, up.data)
    queries = torch.randn(32, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    sub_keys = [torch.randn(2, 64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    x = torch.randn(32, D, requires_grad=True)
    state = (torch.zeros_like(down), torch.zeros_like(down))

    def step() -> None:
        scores, indices = product_key_retrieve(queries, sub_keys, 4)
        y = peer_experts(x, indices.flatten(1), scores.softmax(-1).flatten(1), down, up, row_gradients=collector)
        y.square().sum().backward()
        scale = collector.norm_squared().rsqrt()
        rowwise_adamw_(down.data, *state, *collector.table_factors("down"), grad_scale=scale, **ADAMW, seed=1)
        collector.clear()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_are_not_compiled_again_for_other_numbers_of_tokens() -> None:
    from titan_peer.ops.triton import experts

    def step(T: int) -> None:
        x, indices, gates = torch.randn(T, 64), torch.randint(40, (T, 4)), torch.rand(T, 4)
        kernels.peer_forward(x, indices, gates, down, up, "gelu")

    down, up = torch.randn(40, 1, 64), torch.randn(40, 1, 64)
    step(2000)
    compiled = {device: len(caches[0]) for device, caches in experts.gather_dot_sum.device_caches.items()}
    for T in (2001, 4096, 3000):
        step(T)
    assert compiled == {device: len(caches[0]) for device, caches in experts.gather_dot_sum.device_caches.items()}


def test_a_block_with_attention_and_experts_compiles_whole_and_never_again() -> None:
    """FlexAttention, retrieval and experts, forward and backward, without a graph break; constant shapes, one
    compilation."""
    peer = PEERArgs(num_experts=4096, product_key_dim=[64, 64], num_heads=2, num_experts_per_tok=4, query_dim=64)
    mla = MLAArgs(n_heads=4, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64)
    args = ModelArgs(vocab_size=256, dim=128, n_layers=2, ffn_hidden_dim=256, max_seq_len=256, mla=mla, peer=peer)
    model = Transformer(args)
    model.init_weights()
    rowwise = RowwiseAdamW(
        experts_of(model),
        **{"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
    )
    for block in model.layers:
        block.compile(fullgraph=True)
    losses = []
    tokens = torch.randint(256, (2, 256))
    documents = (torch.arange(256) // 100).expand(2, -1)
    for step in range(6):
        fixed = torch._dynamo.config.patch(error_on_recompile=step >= 3)
        with fixed, torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(tokens, documents, tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
        rowwise.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_debug_job_trains_on_the_gpu(tmp_path: Path) -> None:
    command = [
        "./run_train.sh",
        "--job.config_file",
        "train_configs/debug_model.toml",
        "--job.dump_folder",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "Triton" in done.stderr and "FlexAttention" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] - losses[-1] >= 2.0


def test_tuning_finds_launches_at_least_as_fast_as_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_PEER_CACHE_DIR", str(tmp_path))
    tuning._tuned.cache_clear()
    job = load_config(["--job.config_file", str(ROOT / "train_configs/debug_model.toml")])
    results = tune(job, DEVICE, 2048, gpu_milliseconds)
    assert all(result.best_ms <= result.rule_ms for result in results.values())
    device = torch.device("cuda", 0)
    tuning.save({problem: result.best for problem, result in results.items()}, device)
    assert tuning.is_tuned(device)
    tuning._tuned.cache_clear()
