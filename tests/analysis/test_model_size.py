"""Counts of parameters and FLOPs, compared with the built model and with torch's own counter on plain PyTorch
operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import built, small_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_peer import model as model_module
from titan_peer.analysis.model_size import COMPONENTS, model_size
from titan_peer.config.parse import load_config
from titan_peer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.stem)
def test_components_add_up_to_the_built_model(job: Path) -> None:
    config = load_config(["--job.config_file", str(job), "--model.vocab_size", "4096"])
    with torch.device("meta"):
        model = Transformer(config.model)
    size = model_size(model, config.training.seq_len)
    assert size.total_parameters == sum(p.numel() for p in model.parameters())
    assert {part.component for part in size.components} <= set(COMPONENTS)
    assert {part.layer for part in size.components} == {None, *range(config.model.n_layers)}
    for layer, block in enumerate(model.layers):
        in_layer = sum(part.total_parameters for part in size.components if part.layer == layer)
        assert in_layer == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize(
    "changes", [{"tie_embeddings": True}, {"peer__share_experts": True}, {"peer__keys_per_head": False}]
)
def test_components_add_up_in_every_variant(changes: dict[str, object]) -> None:
    model = built(small_model(**changes))
    assert model_size(model, 16).total_parameters == sum(p.numel() for p in model.parameters())


def test_active_parameters_count_only_chosen_experts() -> None:
    size = model_size(built(small_model()), seq_len=16)
    unchosen = 2 * (64 - 2 * 4) * 2 * 32  # two PEER layers, N - H*k experts, up and down rows of dim 32
    assert size.total_parameters - size.active_parameters == unchosen + 49 * 32  # and all embedding rows but one


def plain_experts(
    x: Tensor, indices: Tensor, gates: Tensor, down: Tensor, up: Tensor, activation: str, row_gradients: object
) -> Tensor:
    """What `peer_experts` computes, in operations that torch's counter knows: one batched product per table."""
    T, K = indices.shape
    dim = x.shape[1]
    z = torch.bmm(down[indices].view(T, -1, dim), x.unsqueeze(-1)).view(T, K, -1)
    hidden = gates.unsqueeze(-1) * F.gelu(z)
    return torch.bmm(hidden.view(T, 1, -1), up[indices].view(T, -1, dim)).squeeze(1)


class PlainRetrieval:
    """What `product_key_retrieve` computes, in operations that torch's counter knows.

    The indices come from all scores, the values (and so the gradients) from the chosen keys. The second product is one
    that the operator's forward does not make, so it is counted separately.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter, self.extra = counter, 0

    def __call__(self, queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
        T, H, _ = queries.shape
        parts = [q.transpose(0, 1) for q in queries.split([keys.shape[2] for keys in sub_keys], dim=-1)]
        with torch.no_grad():
            scores = [torch.bmm(q, keys.transpose(1, 2)) for q, keys in zip(parts, sub_keys)]  # [H, T, n]
            sums = (scores[0].unsqueeze(-1) + scores[1].unsqueeze(-2)).flatten(2)
            indices = sums.topk(k).indices.transpose(0, 1)  # [T, H, k]
        before = self.counter.get_total_flops()
        values = torch.zeros(T * H, k, 1)
        rows = indices // sub_keys[1].shape[1], indices % sub_keys[1].shape[1]
        for q, keys, row in zip(parts, sub_keys, rows):
            chosen = keys[torch.arange(H)[None, :, None], row].flatten(0, 1)  # [T*H, k, q]
            values = values + torch.bmm(chosen, q.transpose(0, 1).reshape(T * H, -1, 1))
        self.extra += self.counter.get_total_flops() - before
        return values.view(T, H, k), indices


@pytest.mark.parametrize(
    "changes",
    [
        {"peer_every_n_layers": 0},
        {},
        {"peer__share_experts": True, "peer__expert_hidden_size": 3, "mla__q_lora_rank": 8},
    ],
    ids=["dense", "peer", "shared experts of three neurons"],
)
def test_flops_agree_with_torchs_counter(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    # equal head dims, so that attention on the CPU does not pad the values
    compare_flops(built(small_model(mla__v_head_dim=12, **changes)), monkeypatch)


@pytest.mark.parametrize("job", ["debug_model", "peer_small"])
def test_flops_of_small_jobs_agree_with_torchs_counter(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(ROOT / "train_configs" / f"{job}.toml")
    args = load_config(["--job.config_file", path, "--model.vocab_size", "4096"]).model
    assert args.mla.qk_head_dim == args.mla.v_head_dim
    compare_flops(built(args), monkeypatch)


def compare_flops(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(model.args.vocab_size, (1, 32))
    size = model_size(model, 32)
    # the counter does not know SDPA's CPU flash kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        retrieval = PlainRetrieval(counter)
        monkeypatch.setattr(model_module, "peer_experts", plain_experts)
        monkeypatch.setattr(model_module, "product_key_retrieve", retrieval)
        logits = model(tokens)
        assert counter.get_total_flops() - retrieval.extra == pytest.approx(32 * size.forward_flops, rel=0.01)
        logits.sum().backward()
    assert counter.get_total_flops() - retrieval.extra == pytest.approx(32 * size.training_flops, rel=0.01)
