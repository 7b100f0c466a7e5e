"""Muon, compared with the singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from small_models import built, small_model
from torch import Tensor

from titan_peer.config.optimizer import Optimizer
from titan_peer.optim.groups import matrix_parts
from titan_peer.optim.muon import Muon, orthogonalize
from titan_peer.optim.optimizers import Optimizers


def polar(matrix: Tensor) -> Tensor:
    """U V^T of the matrix U S V^T."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonalized_matrices_are_their_polar_factor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64) * 1e-6
    torch.testing.assert_close(orthogonalize(matrices, 8), polar(matrices), rtol=0, atol=1e-4)


def test_five_iterations_in_bfloat16_bring_all_but_tiny_singular_values_near_one() -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(32, 32))[0], torch.linalg.qr(torch.randn(64, 32))[0]
    spectrum = torch.logspace(0, -2.2, 32)
    made = orthogonalize((u * spectrum) @ v.T[None], 5)
    assert made.dtype == torch.float32
    along = (u.T @ made[0] @ v).diagonal()
    assert along.min() > 0.7 and along.max() < 1.25
    rounded = orthogonalize(((u * spectrum) @ v.T[None]).bfloat16(), 5)
    assert (rounded.float() - made).norm() / made.norm() < 0.1


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 8, dtype=torch.bfloat16), 5), torch.zeros(1, 4, 8).bfloat16())


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_steps_are_those_of_the_definition_matrix_by_matrix(normalized: bool, cautious: bool) -> None:
    torch.manual_seed(0)
    lr, momentum, beta2, decay = 0.1, 0.9, 0.8, 0.5
    weights = [
        torch.nn.Parameter(torch.randn(8, 12)),
        torch.nn.Parameter(torch.randn(6, 8)),
        torch.nn.Parameter(torch.randn(4, 6)),
    ]
    parts = [(0, (3, 5)), (1, (2, 6)), None]
    expected = [weight.detach().double() for weight in weights]
    moments = [torch.zeros_like(weight) for weight in expected]
    squares = [torch.zeros(len(weight), dtype=torch.float64) for weight in expected]
    group = {"params": weights, "parts": parts, "betas": (0.0, beta2), "weight_decay": decay}
    muon = Muon(
        [group],
        lr=lr,
        momentum=momentum,
        iterations=8,
        normalize_rows=normalized,
        cautious_weight_decay=cautious,
        dtype=torch.float32,
    )
    for step in range(1, 4):
        for i, (weight, of) in enumerate(zip(weights, parts)):
            weight.grad = torch.randn_like(weight)
            gradient = weight.grad.double()
            moments[i] = momentum * moments[i] + (1 - momentum) * gradient
            direction = momentum * moments[i] + (1 - momentum) * gradient
            dim, sizes = of or (0, (len(weight),))
            update = torch.cat([polar(p) * 0.2 * max(p.shape) ** 0.5 for p in direction.split(sizes, dim)], dim)
            if normalized:
                squares[i] = beta2 * squares[i] + (1 - beta2) * update.square().mean(1)
                scaled = update / (squares[i] / (1 - beta2**step)).sqrt()[:, None]
                update = scaled * update.norm() / scaled.norm()
            shrunk = (expected[i] * update > 0) if cautious else torch.ones_like(update)
            expected[i] = expected[i] * (1 - lr * decay * shrunk) - lr * update
        muon.step()
    for weight, right in zip(weights, expected):
        torch.testing.assert_close(weight.detach().double(), right, rtol=0, atol=2e-4)


def test_updates_have_the_size_of_adamw() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 128))
    weight.grad = torch.randn(32, 128)
    group = {"params": [weight], "parts": [None], "betas": (0.0, 0.0), "weight_decay": 0.0}
    Muon([group], lr=1.0, momentum=0.95, iterations=8).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)


def test_a_parameter_that_is_no_matrix_is_refused() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 3, 4))], "parts": [None]}
    with pytest.raises(ValueError, match=r"shape \[2, 3, 4\] is no matrix"):
        Muon([group], lr=1.0, momentum=0.9, iterations=5)


def test_parts_are_the_heads_of_attention_and_retrieval() -> None:
    model = built(small_model())
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts = {names[parameter]: of for parameter, of in matrix_parts(model).items()}
    for name, parameter in model.named_parameters():
        if name in parts:
            dim, sizes = parts[name]
            assert sum(sizes) == parameter.shape[dim], name
    mla, args = model.layers[1].attention, model.args.mla
    assert parts["layers.1.attention.wkv_b.weight"] == (0, (args.qk_nope_head_dim, args.v_head_dim) * args.n_heads)
    assert parts["layers.1.attention.wo.weight"] == (1, (args.v_head_dim,) * args.n_heads)
    # the rows of the first head's keys are those that `absorbed_queries` reads as W^UK
    keys = mla.wkv_b.weight.split(parts["layers.1.attention.wkv_b.weight"][1])[0]
    assert torch.equal(keys, mla.wkv_b.weight.unflatten(0, (args.n_heads, -1))[0, : args.qk_nope_head_dim])


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    model = built(small_model())
    muon, adamw = Optimizers(model, Optimizer(name="muon")).dense
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert of_muon == {
        name
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and parameter.ndim == 2 and "norm" not in name
    }
    assert of_adamw == {name for name in names.values() if "expert_" not in name} - of_muon
    assert all(list(muon.state[p]) == ["step", "momentum"] for group in muon.param_groups for p in group["params"])
