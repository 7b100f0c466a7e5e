"""A compiled job does not recompile: constant shapes are compiled once, and blocks have no graph breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


def test_no_recompilation_after_the_third_step_and_no_graph_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # tests/gpu has the same on a GPU
    torch._dynamo.reset()
    counters.clear()
    job = ["--job.config_file", "train_configs/debug_model.toml", "--job.dump_folder", str(tmp_path)]
    job += ["--checkpoint.enable", "false", "--validation.enable", "false"]
    config = load_config(job)
    trainer = Trainer(config, init_world(config.parallelism))
    batches = iter(trainer.loader)
    losses, graphs = [], []
    for step in range(1, 7):
        trainer.step = step
        with torch._dynamo.config.patch(error_on_recompile=step > 3):
            losses.append(trainer.train_step(batches).loss)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2] == graphs[-1]
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert losses[-1] < losses[0]
