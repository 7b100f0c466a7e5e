"""What the backward pass recomputes, and what it must not count a second time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small_models import built, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_peer.config.job import ActivationCheckpoint
from titan_peer.distributed.activation_checkpoint import apply_activation_checkpointing
from titan_peer.model import Transformer

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
RETRIEVAL, EXPERTS = "titan_peer::product_key_retrieve", "titan_peer::peer_experts"
LAYERS = 3


class Executions(TorchDispatchMode):
    """Counts the ops that run. Entered outside of checkpointing, it does not see ops whose kept outputs are reused."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def trained_step(mode: str, compiled: bool) -> tuple[Transformer, dict[str, Tensor], Counter[str]]:
    """A model after two forward and backward passes; its gradients; and how often each op ran in the second pass."""
    torch._dynamo.reset()
    model = built(small_model(n_layers=LAYERS, n_dense_layers=0, vocab_size=64))
    apply_activation_checkpointing(model, ActivationCheckpoint(mode=mode), compiled=compiled)  # type: ignore[arg-type]
    if compiled:
        for block in model.layers:
            block.compile(fullgraph=True)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    model(tokens, labels=tokens).backward()
    if compiled:  # a dispatch mode would disable compiled code; the profiler would also count a cached op
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(tokens, labels=tokens).backward()
        names = Counter(event.name for event in profile.events() or [])
    else:
        with Executions() as executions:
            model(tokens, labels=tokens).backward()
        names = executions.names
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return model, gradients, names


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("mode", "attention", "retrieval", "experts"),
    [("full", 6, 6, 6), ("selective", 5, 5, 5), ("selective_op", 3, 3, 3)],
)
def test_gradients_and_statistics_are_the_same_and_only_chosen_ops_run_twice(
    mode: str, attention: int, retrieval: int, experts: int, compiled: bool
) -> None:
    plain, plain_gradients, plain_names = trained_step("none", compiled)
    model, gradients, names = trained_step(mode, compiled)
    assert [plain_names[op] for op in (ATTENTION, RETRIEVAL, EXPERTS)] == [LAYERS] * 3
    assert [names[op] for op in (ATTENTION, RETRIEVAL, EXPERTS)] == [attention, retrieval, experts]
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-5, atol=1e-6, msg=name)
    moved = 0
    for (name, buffer), reference in zip(model.named_buffers(), plain.buffers()):
        torch.testing.assert_close(buffer, reference, rtol=1e-6, atol=1e-7, msg=name)
        moved += "running_mean" in name and bool(buffer.abs().max() > 0)
    assert moved == LAYERS
