"""The whole model, which evaluations during training gather on every process."""

from __future__ import annotations

import time
from typing import Any

import torch
from processes import run_in_processes
from small_jobs import SMALL
from torch import Tensor

SECONDS = 30  # how long a collective waits


def gathered(_: None) -> dict[str, Any]:
    """Gather the model, on rank 1 first without and then with enough memory; returns both outcomes."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from titan_peer.config.parse import load_config
    from titan_peer.distributed.parallelize import materialize, parallelize
    from titan_peer.distributed.world import init_world
    from titan_peer.evaluation.during_training import whole_model
    from titan_peer.model import Transformer

    keys = ["--model.vocab_size", "256", "--parallelism.timeout_seconds", str(SECONDS)]
    config = load_config([*SMALL, *keys, "--parallelism.expert_parallel_degree", "2"])
    world = init_world(config.parallelism)
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config, world)
    materialize(model, world.device, offload=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)

    table = (config.model.peer.num_experts, config.model.peer.expert_hidden_size, config.model.dim)
    empty, full_tensor = torch.empty, DTensor.full_tensor

    def no_room(*shape: Any, **settings: Any) -> Tensor:
        if table in (shape, *(tuple(s) for s in shape if isinstance(s, torch.Size))):
            raise torch.OutOfMemoryError("no room for a table")
        return empty(*shape, **settings)

    def no_room_to_gather(self: DTensor, **settings: Any) -> Tensor:
        if tuple(self.shape) == table:
            raise torch.OutOfMemoryError("no room for a table")
        return full_tensor(self, **settings)

    if world.rank == 1:
        torch.empty, DTensor.full_tensor = no_room, no_room_to_gather  # type: ignore[method-assign, assignment]
    start, said = time.monotonic(), ""
    try:
        whole_model(model, config.model, world.device)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    torch.empty, DTensor.full_tensor = empty, full_tensor  # type: ignore[method-assign]

    plain = whole_model(model, config.model, world.device)
    shapes = {tuple(p.shape) for n, p in plain.named_parameters() if "expert_down" in n}
    whole = all((p == 0.5).all().item() for p in plain.parameters())
    dist.destroy_process_group()
    return {"said": said, "seconds": seconds, "shapes": [list(s) == list(table) for s in shapes], "whole": whole}


def test_a_process_without_room_for_the_model_is_said_on_all_and_none_waits_for_it() -> None:
    for found in run_in_processes(2, gathered, None):
        assert found["said"] == "ProcessesFailedError: rank 1: OutOfMemoryError: no room for a table"
        assert found["seconds"] < SECONDS / 2
        assert found["whole"] and found["shapes"] == [True]
