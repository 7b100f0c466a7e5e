"""Run by test_expert_remedies.py: revives dead sub-keys in a group of any size, from counts and states that do not
depend on it, and has rank 0 write all of the layer's tensors.

Usage: revive_experts.py FILE [--section.key value ...]
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.experts.revival import ExpertRevival
from titan_peer.model import peer_layers
from titan_peer.trainer import Trainer


def main(file: str, arguments: list[str]) -> None:
    config = load_config(arguments)
    world = init_world(config.parallelism)
    trainer = Trainer(config, world)
    model, optimizers = trainer.model, trainer.optimizers
    named = {f"state.{name}": tensor for name, tensor in optimizers.named_state() if tensor.ndim > 0}
    for i, tensor in enumerate(named.values()):  # states that are not all zero
        whole = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)).to(tensor.dtype)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local()
            tensor = tensor.to_local()
        tensor.copy_(whole)

    revival = ExpertRevival(model, optimizers, freq=1, seed=5)
    peer = config.model.peer
    if world.is_first:
        for layer, counter in revival.usage._counters.items():
            generator = torch.Generator().manual_seed(layer)
            grid = counter.counts.view(peer.num_heads, *peer.product_key_dim)
            grid.copy_(torch.randint(1, 9, grid.shape, generator=generator))
            grid[0, 3:9] = 0  # head 0, first axis: dead; the other head uses the experts
            grid[:, 20] = 0  # dead in all heads: experts too
            grid[1, :, 5] = 0  # head 1, second axis
    lines = revival.revive(7)
    assert len(lines) == len(list(peer_layers(model))), lines
    tensors = {name: p.detach() for name, p in model.named_parameters()} | named
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    if world.is_first:
        torch.save(whole, file)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
