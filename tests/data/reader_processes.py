"""Code that the loader tests run in new processes.

The processes fork from a server that has imported the libraries but read no data, so each starts quickly and without
any state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from corpora import make_loader, take
from warm_processes import PROCESSES

from titan_peer.config.data_source import DataSource


def in_new_processes(target: Callable[..., None], *arguments: Any, count: int = 1) -> None:
    processes = [PROCESSES.Process(target=target, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [p.exitcode for p in processes] == [0] * count


def continue_loader(_: int, folder: Path, sources: list[DataSource], settings: dict[str, Any], batches: int) -> None:
    """Load state.json if there is one, write the digests of the next batches and the state after them."""
    loader = make_loader(sources, **settings)
    if (folder / "state.json").exists():
        loader.load_state_dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))
    (folder / "digests.json").write_text(json.dumps(take(loader, batches)), encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(loader.state_dict()), encoding="utf-8")


def run_rank(rank: int, world: int, folder: Path, sources: list[DataSource], packing: str, batches: int) -> None:
    """A rank of a real group: resume from state.json, write this rank's digests and the state after them."""
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    loader = make_loader(sources, rank=rank, world=world, packing=packing, local_batch_size=2)
    state = folder / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text(encoding="utf-8")))
    dist.barrier()
    taken = take(loader, batches * 8 // world // 2)  # micro-batches of 2
    (folder / f"digests.{rank}.json").write_text(json.dumps(taken), encoding="utf-8")
    statistics, after = loader.statistics(), loader.state_dict()
    if rank == 0:
        state.write_text(json.dumps(after), encoding="utf-8")
        (folder / "statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
