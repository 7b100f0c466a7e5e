"""Run by test_expert_usage.py in one or more processes: trains a few steps and recounts the experts by brute force.

Arguments: FOLDER [--section.key value ...]. Rank r writes FOLDER/recount-r.npz (its own tokens, counted pair by
pair from what the retrieval returned) and rank 0 FOLDER/counted.npz (what ExpertUsage read, all processes together).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.experts.report import UsageReporter
from titan_peer.experts.usage import Counts
from titan_peer.model import PEER, peer_layers
from titan_peer.trainer import Trainer


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    config = load_config(arguments[1:])
    world = init_world(config.parallelism)
    trainer = Trainer(config, world)
    peer = config.model.peer
    shape = (peer.num_heads, peer.num_experts)
    recount: dict[str, Any] = {}

    def watch(layer: int, module: PEER) -> None:
        counts, gate_sums = np.zeros(shape, np.int64), np.zeros(shape, np.float64)
        recount.update({f"counts{layer}": counts, f"gates{layer}": gate_sums})
        original = module.retrieve

        def retrieve(x: Tensor, is_token: Tensor | None) -> tuple[Tensor, Tensor]:
            indices, scores = original(x, is_token)
            assert is_token is None or is_token.all()
            if module.training and torch._C._current_graph_task_id() == -1:
                gates = scores.detach().double().softmax(-1)
                for head in range(peer.num_heads):
                    places = indices[:, head].flatten().numpy()
                    np.add.at(counts[head], places, 1)
                    np.add.at(gate_sums[head], places, gates[:, head].flatten().numpy())
            return indices, scores

        module.retrieve = retrieve  # type: ignore[method-assign]

    for layer, module in peer_layers(trainer.model):
        watch(layer, module)
    (reporter,) = (part for part in trainer.callbacks if isinstance(part, UsageReporter))
    usage, read = reporter.usage, reporter.usage.read
    window: dict[int, Counts] = {}

    def keep_what_is_read() -> dict[int, Counts]:
        window.update(read())
        return window

    usage.read = keep_what_is_read  # type: ignore[method-assign]
    trainer.train()
    np.savez(folder / f"recount-{world.rank}.npz", **recount)
    if world.is_first:
        counted = {f"counts{layer}": found.counts.numpy() for layer, found in window.items()}
        counted |= {f"gates{layer}": found.gate_sums.numpy() for layer, found in window.items()}
        np.savez(folder / "counted.npz", **counted)
    if dist.is_initialized():
        dist.destroy_process_group()
