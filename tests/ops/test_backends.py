"""A PEER layer on the Triton backend through the registered operators, compared with the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from titan_peer.common.errors import UserError
from titan_peer.model import PEER, PEERArgs
from titan_peer.ops import backends
from titan_peer.optim.rowwise import RowwiseAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def choose_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def choose(name: str) -> None:
        monkeypatch.setenv("TITAN_PEER_BACKEND", name)
        backends._choose.cache_clear()

    yield choose
    backends._choose.cache_clear()


@pytest.mark.parametrize("mode", ["eager", "compiled", "compiled, recomputed, bfloat16"])
def test_a_peer_layer_trains_as_on_the_reference(mode: str, choose_backend: Callable[[str], None]) -> None:
    """Through the registered operators: whole-graph compilation, activation checkpointing, autocast, row-wise
    update."""
    args = PEERArgs(num_experts=96, product_key_dim=[12, 8], num_heads=2, num_experts_per_tok=2, query_dim=16)
    torch.manual_seed(0)
    x, results = torch.randn(1, 5, 24).to(DEVICE), []
    for backend in ("triton", "reference"):
        choose_backend(backend)
        torch._dynamo.reset()
        torch.manual_seed(3)
        layer = PEER(24, args)
        layer.init_weights(std=0.02, residual_scale=1.0)
        layer.to(DEVICE)
        optimizer = RowwiseAdamW([layer.experts], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        run = checkpoint_wrapper(layer) if "recomputed" in mode else layer
        if "compiled" in mode:
            run.compile(fullgraph=True, backend="aot_eager")
        start = layer.experts.expert_down.detach().clone()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled="bfloat16" in mode):
            y = run(x)
        y.square().sum().backward()
        _, down_rows, up_rows = optimizer.collectors[0].materialize()
        optimizer.step()
        step = layer.experts.expert_down.detach() - start
        results.append((y.detach(), layer.wq.weight.grad, layer.sub_keys[0].grad, down_rows, up_rows, step))
    assert results[0][-1].count_nonzero() > 0
    if "bfloat16" not in mode:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    # the first AdamW step is the gradient's sign, which rounding to bfloat16 changes where the gradient is about 0
    for ours, theirs in zip(results[0][:-1], results[1][:-1]):
        assert (ours - theirs).norm() / theirs.norm() < 2e-2


def test_a_backend_that_cannot_run_is_named(choose_backend: Callable[[str], None]) -> None:
    for name, message in (
        ("cuda", "must be one of auto, reference, cpu, triton"),
        ("triton", "not on mps|on CPU tensors only"),
    ):
        choose_backend(name)
        with pytest.raises(UserError, match=message):
            backends._choose("mps")
