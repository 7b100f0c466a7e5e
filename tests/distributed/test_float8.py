"""float8 matrix products with compilation and FSDP2, rounded as in hardware but computed in higher precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import losses, train_jobs

from titan_peer.common.errors import UserError
from titan_peer.config.job import Float8
from titan_peer.distributed.float8 import apply_float8
from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer

JOB = [
    *("--job.config_file", "train_configs/debug_model.toml", "--metrics.log_freq", 1),
    *("--training.local_batch_size", 4, "--training.mixed_precision_param", "bfloat16"),
    *("--validation.enable", "false", "--checkpoint.enable", "false"),
]
FLOAT8 = ["--float8.enable", "true", "--float8.emulate", "true"]
ALL_GATHER = ["--float8.enable_fsdp_float8_all_gather", "true"]
ALL_GATHER += ["--float8.precompute_float8_dynamic_scale_for_fsdp", "true"]


def final_losses(tmp_path: Path, recipes: dict[str, list[str]], *more: object) -> dict[str, float]:
    """Mean loss of the last ten steps of each job, on two processes."""
    train_jobs(2, [[*JOB, *more, *keys, "--job.dump_folder", tmp_path / name] for name, keys in recipes.items()])
    return {name: sum(losses(tmp_path / name)[-10:]) / 10 for name in recipes}


def test_float8_gathered_in_float8_trains_close_to_bfloat16(tmp_path: Path) -> None:
    recipes = {"bfloat16": [], "tensorwise": [*FLOAT8, *ALL_GATHER]}
    shorter = ["--training.steps", 24, "--training.seq_len", 64, "--model.n_layers", 1, "--compile.enable", "false"]
    found = final_losses(tmp_path, recipes, *shorter)
    assert found["tensorwise"] == pytest.approx(found["bfloat16"], rel=0.02)
    assert losses(tmp_path / "tensorwise") != losses(tmp_path / "bfloat16")


def test_checkpoint_of_weights_gathered_in_float8_goes_on_without_float8(tmp_path: Path) -> None:
    job = [*JOB, "--job.dump_folder", tmp_path, "--training.seq_len", 32, "--model.n_layers", 1]
    job += ["--compile.enable", "false", "--checkpoint.enable", "true", "--training.global_batch_size", 8]
    train_jobs(
        2, [[*job, *FLOAT8, *ALL_GATHER, "--training.steps", 3], [*job, *FLOAT8, *ALL_GATHER, "--training.steps", 5]]
    )
    train_jobs(1, [[*job, "--training.steps", 8]])
    curve = losses(tmp_path)
    assert len(curve) == 8 and curve[5] < curve[0]


@pytest.mark.slow
def test_compiled_debug_model_ends_within_two_percent_of_bfloat16(tmp_path: Path) -> None:
    recipes = {
        "bfloat16": [],
        "tensorwise": FLOAT8,
        "tensorwise gathered": [*FLOAT8, *ALL_GATHER],
        "rowwise": [*FLOAT8, "--float8.recipe_name", "rowwise"],
    }
    found = final_losses(tmp_path, recipes)
    assert found["bfloat16"] < losses(tmp_path / "bfloat16")[0] - 2
    for name, loss in found.items():
        assert loss == pytest.approx(found["bfloat16"], rel=0.02), found
        assert name == "bfloat16" or losses(tmp_path / name) != losses(tmp_path / "bfloat16")


def meta_model(**changes: int) -> Transformer:
    mla = MLAArgs(n_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    peer = PEERArgs(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16)
    with torch.device("meta"):
        args = ModelArgs(vocab_size=64, dim=32, n_layers=2, ffn_hidden_dim=48, mla=mla, peer=peer, **changes)
        return Transformer(args)


def test_layers_that_do_not_fit_the_head_and_filtered_ones_stay() -> None:
    config = Float8(enable=True, emulate=True, filter_fqns=["layers.1.peer"])
    converted = apply_float8(meta_model(), config, sharded=False)
    # wkv_a has 32 + 8 outputs, not a multiple of 16
    expected = {f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wkv_b", "wo")}
    assert set(converted) == expected | {f"layers.0.feed_forward.w{i}" for i in (1, 2, 3)}
    model = meta_model()
    apply_float8(model, config, sharded=False)
    assert type(model.output) is torch.nn.Linear
    assert type(model.layers[0].attention.wq).__name__ == "Float8Linear"


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(UserError, match=r"filter_fqns = \['layers'\]"):
        apply_float8(meta_model(), Float8(enable=True, emulate=True, filter_fqns=["layers"]), sharded=False)
