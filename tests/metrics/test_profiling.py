"""The traces and snapshots of `[profiling]`."""

from __future__ import annotations

import gzip
import json

import pytest
from small_jobs import trainer

from titan_peer.common.errors import UserError

TRACES = ["--profiling.enable_profiling", "true", "--profiling.profile_freq", 3, "--profiling.profiler_warmup", 1]


def test_a_trace_is_written_of_every_nth_step_and_shows_the_expert_operators(tmp_path):
    trainer(tmp_path, "--checkpoint.enable", "false", *TRACES).train()
    folders = sorted(path.name for path in (tmp_path / "profile_traces").iterdir())
    assert folders == ["iteration_3", "iteration_6"]
    with gzip.open(tmp_path / "profile_traces/iteration_6/rank0_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    # one optimizer step over two blocks: each retrieves and applies its experts once
    assert sum(name == "titan_peer::product_key_retrieve" for name in names) == 2
    assert sum(event["name"].startswith("ProfilerStep") for event in events if event.get("ph") == "X") == 1
    assert "titan_peer::" in (tmp_path / "profile_traces/iteration_6/rank0_operators.txt").read_text(encoding="utf-8")


def test_memory_snapshots_without_a_gpu_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"profiling\.enable_memory_snapshot = true: needs a CUDA device"):
        trainer(tmp_path, "--profiling.enable_memory_snapshot", "true")


def test_a_window_longer_than_its_period_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"profiling\.profile_freq = 3: must be at least .* = 3 \+ 1"):
        trainer(tmp_path, *TRACES[:-2])
