"""Impossible settings are refused before any process waits for another; the parallel degrees of a job."""

from __future__ import annotations

import pytest
import torch

from titan_peer.analysis.dry_run import fake_world
from titan_peer.common.errors import UserError
from titan_peer.config.job import Parallelism
from titan_peer.config.parse import load_config
from titan_peer.distributed.parallelize import parallelize
from titan_peer.distributed.world import World, init_world, joined_as
from titan_peer.model import Transformer

DEBUG = ["--job.config_file", "train_configs/debug_model.toml"]


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"data_parallel_replicate_degree": 3},
            "data_parallel_shard_degree = 3 x 1: must equal the number of processes, 4",
        ),
        (
            {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4},
            "data_parallel_shard_degree = 2 x 4: must equal the number of processes, 4",
        ),
        ({"expert_parallel_degree": 3}, "expert_parallel_degree = 3: must divide the number of processes, 4"),
        ({"expert_parallel_degree": 8}, "expert_parallel_degree = 8: must divide the number of processes, 4"),
    ],
)
def test_degrees_that_do_not_fit_the_processes(
    degrees: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=message):
        init_world(Parallelism(**degrees))
    assert not torch.distributed.is_initialized()


def test_world_says_the_degrees_of_several_processes_and_of_one() -> None:
    config = load_config([*DEBUG, "--parallelism.expert_parallel_degree", "2"])
    config.parallelism.data_parallel_replicate_degree = 4
    with fake_world(config, 8) as world:
        assert (world.size, world.dp_degree, world.dp_rank, world.ep_degree) == (8, 8, 0, 2)
        assert world.mesh is not None and world.mesh.shape == (4, 2)
        assert world.expert_mesh is not None and world.expert_mesh.shape == (4, 2)
        assert world.dp_group is not None and world.dp_group.size() == 8
        assert joined_as() == (0, 8)
    config.parallelism = Parallelism()
    with fake_world(config, 1) as world:
        assert (world.size, world.dp_degree, world.dp_rank, world.ep_degree) == (1, 1, 0, 1)
        assert world.dp_group is None and world.is_first and joined_as() == (0, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("--parallelism.expert_parallel_degree 0", "expert_parallel_degree = 0: must be at least 1"),
        (
            "--parallelism.expert_parallel_degree 5 --model.peer.num_experts 12 --model.peer.product_key_dim 3 4",
            "expert_parallel_degree = 5: leaves a process without any of model.peer.num_experts = 12",
        ),
        (
            "--float8.enable true --training.local_batch_size 1 --training.seq_len 40",
            "local_batch_size = 1: times training.seq_len = 40 must be a multiple of 16",
        ),
        (
            "--float8.enable true --float8.recipe_name rowwise --float8.enable_fsdp_float8_all_gather true",
            'needs float8.recipe_name = "tensorwise", not "rowwise"',
        ),
        (
            "--float8.enable true --float8.precompute_float8_dynamic_scale_for_fsdp true",
            "needs float8.enable_fsdp_float8_all_gather = true",
        ),
        (
            "--optimizer.expert_update dense --optimizer.expert_compute_dtype bfloat16",
            'expert_compute_dtype = bfloat16: needs optimizer.expert_update = "rowwise"',
        ),
        ("--optimizer.name adamv", "optimizer.name = adamv: must be one of adamw"),
        ("--metrics.heartbeat_seconds -1", "heartbeat_seconds = -1: must be from 0 to 31536000"),
    ],
)
def test_keys_that_contradict_one_another(keys: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config([*DEBUG, *keys.split()])
    assert message in str(error.value)


def test_offloading_takes_several_processes() -> None:
    config = load_config([*DEBUG, "--training.enable_cpu_offload", "true", "--model.vocab_size", "64"])
    with torch.device("meta"):
        model = Transformer(config.model)
    world = World(0, 1, torch.device("cpu"), None, None)
    with pytest.raises(UserError, match=r"training\.enable_cpu_offload = true: .* several processes"):
        parallelize(model, config, world)
