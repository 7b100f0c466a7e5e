"""Asynchronous saves and memory snapshots with the model on a GPU."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
from small_jobs import steps, tensors_of, trainer
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from titan_peer.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_an_asynchronous_save_from_a_gpu_holds_the_state_of_its_step(tmp_path, monkeypatch):
    stage = StateDictStager.stage

    def stage_late(self, state_dict, **kwargs):
        time.sleep(0.5)
        return stage(self, state_dict, **kwargs)

    monkeypatch.setattr(StateDictStager, "stage", stage_late)
    expected: dict[int, dict[str, torch.Tensor]] = {}
    save = Trainer.save_checkpoint

    def remember(self, **kwargs):
        expected[self.step] = {name: t.detach().cpu().clone() for name, t in self.checkpointer._tensors().items()}
        save(self, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", remember)
    trainer(tmp_path, "--checkpoint.async_mode", "async").train()
    assert steps(tmp_path) == ["step-2", "step-4", "step-6"]
    for step, tensors in expected.items():
        saved = tensors_of(tmp_path / f"checkpoint/step-{step}")
        assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items()), step


def test_a_memory_snapshot_names_what_was_allocated(tmp_path):
    settings = [
        "--profiling.enable_memory_snapshot",
        "true",
        "--profiling.profile_freq",
        5,
        "--checkpoint.enable",
        "false",
    ]
    trainer(tmp_path, *settings).train()
    path = tmp_path / "memory_snapshot/iteration_5/rank0_memory_snapshot.pickle"
    snapshot = pickle.loads(path.read_bytes())  # written by this test's own job
    assert sum(segment["total_size"] for segment in snapshot["segments"]) > 0
    assert any(trace for trace in snapshot["device_traces"])
