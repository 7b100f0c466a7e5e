"""However many tokens a step has, its row gradients need no more memory than dense ones and have the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titan_peer.model import Experts, PEERArgs
from titan_peer.ops import RowGradients, backends, peer_experts
from titan_peer.optim.rowwise import RowwiseAdamW

N, E, D, K, T = 16, 2, 24, 4, 6
DENSE_BYTES = 2 * 4 * N * E * D
ONE_MICRO_BATCH = T * (K * (8 + 2 * 4 * E) + 2 * 4 * D)


@pytest.fixture
def choose_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def choose(name: str) -> None:
        monkeypatch.setenv("TITAN_PEER_BACKEND", name)
        backends._choose.cache_clear()

    yield choose
    backends._choose.cache_clear()


def micro_batches(count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, indices with absent places and without the last four experts, gates."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            torch.randn(T, D, generator=generator),
            torch.randint(-1, N - 4, (T, K), generator=generator),
            torch.rand(T, K, generator=generator),
        )


def held_bytes(collector: RowGradients) -> int:
    """Bytes of all tensors of the collector, except for its number."""
    tensors = [leaf for leaf in tree_leaves(list(vars(collector).values())) if isinstance(leaf, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) - collector.handle.nbytes


def experts() -> Experts:
    torch.manual_seed(1)
    module = Experts(D, PEERArgs(num_experts=N, expert_hidden_size=E))
    module.init_weights(residual_scale=1.0)
    return module


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("count", [7, 1])
def test_a_step_of_many_tokens_takes_the_memory_of_dense_gradients_and_updates_the_same(
    backend: str, count: int, choose_backend: Callable[[str], None]
) -> None:
    choose_backend(backend)
    assert ONE_MICRO_BATCH < DENSE_BYTES < 7 * ONE_MICRO_BATCH
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    module, plain = experts(), experts()
    start = module.expert_up.detach().clone()
    optimizer = RowwiseAdamW([module], **settings)
    dense = torch.optim.AdamW(plain.parameters(), **settings)
    (collector,) = optimizer.collectors
    for step in range(1 if backend == "triton" else 2):  # Triton's interpreter is slow
        for x, indices, gates in micro_batches(count):
            x.requires_grad_()
            module(x, indices, gates).square().sum().backward()
            assert held_bytes(collector) <= DENSE_BYTES + N + 1
            plain(x, indices, gates).square().sum().backward()
        gradients = [p.grad for p in plain.parameters()]
        touched = gradients[0].abs().sum((1, 2)) > 0
        rows, down, up = collector.materialize()
        assert rows.tolist() == touched.nonzero().flatten().tolist() and len(rows) <= N - 4
        for ours, theirs in zip((down, up), gradients):
            torch.testing.assert_close(ours, theirs[touched], rtol=1e-4, atol=1e-5)
        norm = sum(g.square().sum() for g in gradients)
        torch.testing.assert_close(collector.norm_squared(), norm, rtol=1e-4, atol=0)
        optimizer.step()
        dense.step()
        dense.zero_grad()
        for ours, theirs in zip(module.parameters(), plain.parameters()):
            torch.testing.assert_close(ours[touched], theirs[touched], rtol=1e-3, atol=2e-4, msg=f"step {step}")
        assert torch.equal(module.expert_up[~touched], start[~touched])
        assert collector.is_empty


def test_gradients_are_folded_where_one_micro_batch_alone_takes_more_and_what_is_cleared_is_gone() -> None:
    down, up = (nn.Parameter(torch.randn(3, 1, 8)) for _ in range(2))
    collector = RowGradients(down.data, up.data)
    for seed in range(3):
        torch.manual_seed(seed)
        x, indices, gates = torch.randn(50, 8), torch.randint(0, 2, (50, 2)), torch.rand(50, 2)
        peer_experts(x.requires_grad_(), indices, gates, down, up, row_gradients=collector).sum().backward()
        assert held_bytes(collector) <= 2 * 4 * down.numel() + 4
        expected = torch.autograd.grad(peer_experts(x, indices, gates, down, up).sum(), [down, up])
        for which, gradient in zip(("down", "up"), expected):
            out = torch.zeros_like(gradient)
            collector.write_dense(which, out)  # type: ignore[arg-type]
            torch.testing.assert_close(out, gradient, rtol=1e-4, atol=1e-5)
        collector.clear()
