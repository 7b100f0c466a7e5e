"""Muon makes the same steps on sharded matrices as on whole ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from titan_peer.distributed.matrix_owners import _owners, on_owners
from titan_peer.optim.muon import Muon

SHAPES = [(8, 12), (5, 8), (1, 6), (8, 12), (7, 3)]  # rows that four processes cannot share evenly; some get none
PARTS = [(0, (3, 5)), (1, (2, 6)), None, (1, (4, 4, 4)), None]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def steps(weights: list[torch.nn.Parameter], place: object = lambda tensor: tensor) -> list[torch.nn.Parameter]:
    group = {"params": weights, "parts": PARTS, "betas": (0.0, 0.8), "weight_decay": 0.1}
    muon = Muon([group], lr=0.1, momentum=0.9, iterations=5, normalize_rows=True, dtype=torch.float32)
    for step in range(3):
        for i, (weight, gradient) in enumerate(zip(weights, gradients(step))):
            weight.grad = None if (step, i) == (1, 3) else place(gradient)  # type: ignore[operator]
        muon.step()
    return weights


def sharded_steps(mesh_shape: tuple[int, ...]) -> tuple[list[list[list[float]]], list[int]]:
    dist.init_process_group("gloo")
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    placements = [*[Replicate()] * (len(mesh_shape) - 1), Shard(0)]

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, placements)

    worked_on: list[int] = []

    def count(indices, whole):
        worked_on.extend(indices)
        assert [list(matrix.shape) for matrix in whole] == [list(SHAPES[i]) for i in indices]
        return [matrix * 2 for matrix in whole]

    params = [place(gradient) for gradient in gradients(0)]
    doubled = on_owners(params, [param.to_local().bfloat16() for param in params], count)
    for param, twice in zip(params, doubled):
        assert torch.equal(twice, param.to_local().bfloat16() * 2)
    weights = steps([torch.nn.Parameter(place(gradient)) for gradient in gradients(99)], place)
    return [weight.full_tensor().tolist() for weight in weights], worked_on


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)])
def test_sharded_matrices_follow_whole_ones_and_each_is_worked_on_once(mesh_shape: tuple[int, ...]) -> None:
    expected = steps([torch.nn.Parameter(gradient) for gradient in gradients(99)])
    results = run_in_processes(4, sharded_steps, mesh_shape)
    for weights, _ in results:
        for found, right in zip(weights, expected):
            torch.testing.assert_close(torch.tensor(found), right.detach(), rtol=0, atol=1e-5)
    assert sorted(i for _, worked_on in results for i in worked_on) == list(range(len(SHAPES)))


def test_owners_have_about_the_same_number_of_elements() -> None:
    assert _owners((9, 5, 4, 3, 3), 2) == [0, 1, 1, 0, 1]
    assert _owners((1, 2), 4) == [1, 0]
