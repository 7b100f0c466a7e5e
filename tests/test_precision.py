"""The same rule of precision everywhere: matrices are multiplied in the compute dtype; everything that chooses experts
or accumulates is float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from small_models import built, small_model
from torch import Tensor

from titan_peer.distributed.parallelize import autocast, matrices
from titan_peer.inference.decoder import Decoder
from titan_peer.inference.latent_cache import CacheBatch
from titan_peer.model import PEER, PEERArgs, Transformer, peer_layers
from titan_peer.ops import backends, product_key_retrieve
from titan_peer.ops.latent_attention import attend_to_latents

BACKENDS = ("cpu", "reference", "triton")
CPU = torch.device("cpu")


@pytest.fixture
def choose_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def choose(name: str) -> None:
        monkeypatch.setenv("TITAN_PEER_BACKEND", name)
        backends._choose.cache_clear()

    yield choose
    backends._choose.cache_clear()


def exact_choice(queries: Tensor, sub_keys: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Scores and experts by brute force in float64."""
    parts = queries.double().split([keys.shape[2] for keys in sub_keys], dim=-1)
    scores = [torch.einsum("thq,hnq->thn", p, keys.double()) for p, keys in zip(parts, sub_keys)]
    total = (scores[0][..., :, None] + scores[1][..., None, :]).flatten(2)
    return total.topk(k, dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[70, 9], [16, 16]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_products_on_every_path(
    backend: str, sizes: list[int], dtype: torch.dtype, choose_backend: Callable[[str], None]
) -> None:
    """Long axes use other kernels than short ones, but both round the same numbers."""
    choose_backend(backend)
    torch.manual_seed(0)
    queries, sub_keys = torch.randn(40, 2, 32).to(dtype), [torch.randn(2, n, 16).to(dtype) for n in sizes]
    scores, indices = product_key_retrieve(queries, sub_keys, 4)
    expected, experts = exact_choice(queries, sub_keys, 4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, experts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("query_norm", ["batch", "rms", "none"])
def test_bfloat16_training_chooses_what_float32_scores_of_its_queries_choose(
    backend: str, query_norm: str, choose_backend: Callable[[str], None]
) -> None:
    """Nothing after the projected queries is rounded: norm, gains, sub-keys, scores."""
    choose_backend(backend)
    args = PEERArgs(num_experts=4096, product_key_dim=[64, 64], num_heads=2, num_experts_per_tok=4, query_dim=32)
    args.query_norm = query_norm  # type: ignore[assignment]
    torch.manual_seed(0)
    peer = PEER(24, args)
    peer.init_weights(std=0.2, residual_scale=1.0)
    if peer.query_norm is not None:
        torch.nn.init.uniform_(peer.query_norm.weight, 0.5, 1.5)
    x = torch.randn(64, 24)
    with autocast(CPU, torch.bfloat16)():
        indices, gates = peer.route(x)
        projected = peer.wq(x)
    assert projected.dtype == torch.bfloat16 and gates.dtype == torch.float32
    queries = projected.double().view(64, 2, 32)
    if query_norm == "batch":
        queries = (queries - queries.mean(0)) / (queries.var(0, unbiased=False) + 1e-5).sqrt() * peer.query_norm.weight
    elif query_norm == "rms":
        queries = queries * torch.rsqrt(queries.square().mean(-1, keepdim=True)) * peer.query_norm.weight
    scores, experts = exact_choice(queries, list(peer.sub_keys), 4)
    torch.testing.assert_close(gates.double(), scores.softmax(-1), rtol=1e-4, atol=1e-6)
    assert (indices != experts).float().mean() < 2e-3  # equal but for scores that are equal within float32 rounding


def residual_stream(model: Transformer) -> list[Tensor]:
    """A list to which each forward pass adds the inputs of every block and of the last norm."""
    seen: list[Tensor] = []
    for module in (*model.layers, model.norm):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen


def low_precision_copy(model: Transformer) -> Transformer:
    """The model, as if opened from a checkpoint for inference in bfloat16."""
    copy = built(model.args)
    copy.load_state_dict(model.state_dict())
    tables = {p for name, p in copy.named_parameters() if "expert_" in name}
    for parameter in matrices(copy) | tables:
        parameter.data = parameter.data.bfloat16()
    return copy.eval()


def test_the_residual_stream_is_float32_and_decoding_rounds_what_training_rounds() -> None:
    model = built(small_model(n_layers=4, peer__num_experts=1024, peer__product_key_dim=[32, 32])).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    tokens = torch.randint(50, (2, 24))

    def run(model: Transformer, forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, residual streams and the chosen experts of each PEER layer."""
        routed: list[Tensor] = []

        def record(_: PEER, indices: Tensor, gates: Tensor) -> None:
            routed.append(indices.view(2, -1, *indices.shape[1:]))

        for _, peer in peer_layers(model):
            peer.attach("record", record)
        streams = residual_stream(model)
        with torch.no_grad():
            logits = forward()
        assert all(x.dtype == torch.float32 for x in streams)
        return logits.float(), streams, routed

    context: AbstractContextManager[object] = autocast(CPU, torch.bfloat16)()
    with context:
        logits, streams, experts = run(model, lambda: model(tokens))
    copy = low_precision_copy(model)
    # a model with bfloat16 tables reads rounded experts, unlike training: here both read rounded ones
    for (_, ours), (_, theirs) in zip(peer_layers(copy), peer_layers(model)):
        ours.experts = theirs.experts
    decoder = Decoder(copy, compile=False)
    whole, whole_streams, whole_experts = run(copy, lambda: decoder.logits(decoder.whole(tokens)))
    assert torch.equal(whole, logits)
    assert all(torch.equal(a, b) for a, b in zip(whole_streams, streams))
    assert all(torch.equal(a, b) for a, b in zip(whole_experts, experts))

    cache = decoder.new_cache(4)
    assert cache.dtype == torch.bfloat16
    batch = CacheBatch([cache.reserve(24), cache.reserve(24)], [0, 0], CPU)
    with torch.no_grad():
        steps = [decoder.logits(decoder(tokens[:, i : i + 1], batch.step([1, 1]), cache)) for i in range(24)]
    # One at a time, in the absorbed form, other products are rounded, and now and then another expert is chosen for it.
    errors = (torch.cat(steps, dim=1) - logits).norm(dim=-1) / logits.norm(dim=-1)
    assert errors.median() < 0.02


def test_absorbed_attention_does_not_round_its_scores() -> None:
    torch.manual_seed(0)
    q, cached = (3 * torch.randn(1, 1, 4, 24)).bfloat16(), torch.randn(1, 200, 24).bfloat16()
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            out = attend_to_latents(q, cached, mask, 1.0, 16)
        weights = (q.double()[0, 0] @ cached.double()[0].T).softmax(-1)
        exact = weights @ cached.double()[0, :, :16]
        assert out.dtype == torch.bfloat16
        assert (out[0, 0].double() - exact).norm() / exact.norm() < 5e-3


def test_matrices_are_the_weights_of_linear_layers_but_for_a_tied_head() -> None:
    for tied in (False, True):
        model = built(small_model(tie_embeddings=tied, mla__q_lora_rank=8))
        names = {name for name, parameter in model.named_parameters() if parameter in matrices(model)}
        kept = ("norm", "sub_keys", "expert_", "tok_embeddings")
        assert names == {n for n, _ in model.named_parameters() if not any(part in n for part in kept)}
