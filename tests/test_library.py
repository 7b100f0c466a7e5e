"""The parts for other people's models: one import, constructed by keywords, right for any leading shape."""

from __future__ import annotations

import subprocess
import sys

import PEER_pytorch
import pytest
import torch
from torch import nn

import titan_peer
from titan_peer import PEER, PEERArgs

SMALL = {"num_experts": 48, "num_heads": 2, "num_experts_per_tok": 4, "query_dim": 16}


def test_every_name_is_there_and_the_package_alone_does_not_load_torch() -> None:
    for name in titan_peer.__all__:
        assert getattr(titan_peer, name) is not None
    assert set(titan_peer.__all__) <= set(dir(titan_peer))
    program = "import sys, titan_peer; titan_peer.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'PEERS'"):
        titan_peer.PEERS  # noqa: B018


def test_a_layer_by_keywords_is_that_of_its_arguments_with_the_squarest_axes() -> None:
    torch.manual_seed(0)
    layer = PEER(12, **SMALL)
    torch.manual_seed(0)
    same = PEER(12, PEERArgs(product_key_dim=[8, 6], **SMALL))
    assert [len(keys[0]) for keys in layer.sub_keys] == [8, 6]
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), same(x)) and layer(x).abs().max() > 0


@pytest.mark.parametrize("number", [1, 2, 7, 12, 1024, 2**20, 1000])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_squarest_axes_are_the_most_equal_ones_of_all(number: int, axes: int) -> None:
    from titan_peer.model_args import squarest

    sizes = squarest(number, axes)
    assert len(sizes) == axes and torch.tensor(sizes).prod() == number
    if axes == 2:
        assert max(sizes) == min(d for d in range(1, number + 1) if number % d == 0 and d * d >= number)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2000, "product_key_dim": [32, 32]}, "product 1,024 must equal num_experts = 2,000"),
        ({"num_experts": 0}, "num_experts = 0: must be at least 1"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok = 8: must be at most num_experts = 4"),
        ({"query_dim": 15}, "query_dim = 15: must be a multiple of the number of axes of product_key_dim, 2"),
        ({"gates": "soft"}, "gates = 'soft': must be one of 'softmax', 'sigmoid', 'relu'"),
    ],
)
def test_an_impossible_layer_is_refused_at_construction(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEER(16, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_expert'"):
        PEER(16, num_expert=4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)])
def test_any_leading_shape_is_a_list_of_tokens(shape: tuple[int, ...], training: bool) -> None:
    layer = PEER(12, **SMALL, query_norm="rms").train(training)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and torch.isfinite(x.grad).all()
    rows = [layer(row) for row in x.reshape(-1, 12)]
    if rows:
        torch.testing.assert_close(y.reshape(-1, 12), torch.stack(rows))


def test_a_transposed_input_and_its_padding_are_read_as_they_are() -> None:
    layer = PEER(12, **SMALL).eval()
    x, is_token = torch.randn(5, 2, 12).transpose(0, 1), torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]]).bool()
    y = layer(x, is_token=is_token)
    torch.testing.assert_close(y, torch.where(is_token[..., None], layer(x.contiguous()), 0))


def test_weights_have_their_initial_values_at_once_unless_they_are_on_meta() -> None:
    layer = PEER(64, num_experts=1024)
    assert layer.experts is not None
    for weight, std in ((layer.wq.weight, 1 / 8), (layer.experts.expert_down, 1 / 8), (layer.sub_keys[0], 1 / 8)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert all(parameter.is_meta for parameter in PEER(64, num_experts=2**40, device="meta").parameters())


@pytest.mark.parametrize("cast", ["constructed", "moved"])
def test_a_layer_in_bfloat16_computes_near_the_one_in_float32(cast: str) -> None:
    torch.manual_seed(0)
    wide = PEER(12, **SMALL)
    narrow = PEER(12, **SMALL, dtype=torch.bfloat16) if cast == "constructed" else PEER(12, **SMALL).bfloat16()
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())  # the same rounded weights
    x = torch.randn(20, 12).bfloat16()
    y, expected = narrow(x), wide(x.float())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad is not None for p in narrow.parameters())
    # rounding of a query may choose another expert: most tokens are near
    assert ((y - expected).abs().amax(1) < 0.05 * expected.abs().max()).float().mean() > 0.8


# ---- PEER-pytorch


def peer_pytorch(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = PEER_pytorch.PEER(24, heads=3, num_experts=100, num_experts_per_head=4, **settings)
    nn.init.normal_(layer.keys)  # as they are made, scores are so small that rounding decides
    return layer


@pytest.mark.parametrize(
    "settings",
    [
        {"non_competing_scores": False},
        {"non_competing_scores": True},  # one expert per head
        {"non_competing_scores": False, "dim_key": 6, "product_key_topk": 7, "activation": nn.SiLU},
        {"non_competing_scores": False, "activation": lambda: nn.GELU(approximate="tanh")},
    ],
)
def test_a_layer_of_peer_pytorch_is_converted_with_equal_output_and_gradients(settings: dict[str, object]) -> None:
    theirs = peer_pytorch(**settings)
    ours = PEER.from_peer_pytorch(theirs)
    x = torch.randn(2, 7, 24)
    expected, found = theirs(x), ours(x)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert ours.experts is not None
    for mine, their in (
        (ours.experts.expert_down, theirs.weight_down_embed.weight),
        (ours.experts.expert_up, theirs.weight_up_embed.weight),
    ):
        torch.testing.assert_close(mine.grad[:, 0], their.grad, rtol=1e-4, atol=1e-4 * their.grad.abs().max().item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separate_embed_per_head": True}, "separate_embed_per_head = True"),
        ({"pre_rmsnorm": True}, "pre_rmsnorm = True"),
        ({"activation": nn.Tanh}, "activation = Tanh: must be GELU, ReLU or SiLU"),
        ({"non_competing_scores": False, "product_key_topk": 3}, "product_key_topk = 3: is fewer than the 4 experts"),
    ],
)
def test_what_cannot_be_converted_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEER.from_peer_pytorch(peer_pytorch(**settings))
