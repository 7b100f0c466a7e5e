"""Small trained models of two kinds and their exports, for the tests of sharing."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.sharing.export import export_checkpoint
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
JOB = f"""
--job.config_file {ROOT}/train_configs/debug_model.toml --compile.enable false --validation.enable false
--training.mixed_precision_param float32 --training.gc_freq 0 --training.seq_len 64 --training.local_batch_size 2
--training.steps 4 --model.dim 64 --model.n_layers 3 --model.init_std 0.1 --optimizer.lr 1e-2
--model.mla.rope_factor 4.0 --model.mla.original_seq_len 128 --model.mla.mscale 0.8 --model.max_seq_len 1024
""".split()
VARIANTS = {
    "two axes": "--model.peer.num_experts 1024 --model.peer.product_key_dim 32 32 --model.n_dense_layers 1",
    "three axes": """--model.peer.num_experts 240 --model.peer.product_key_dim 4 6 10 --model.peer.query_dim 96
        --model.peer.expert_hidden_size 2 --model.peer.query_norm rms --model.peer.share_experts true
        --model.peer.norm_query true --model.peer.norm_keys true --model.peer.keys_per_head false
        --model.peer.gates sigmoid --model.peer.activation silu --model.tie_embeddings true --model.mla.q_lora_rank 24
        --model.mla.v_head_dim 80 --model.embedding_norm false --model.zero_init_outputs false --model.tokenizer_path byte""",
}
TEXTS = ["In the beginning", "def f(x):\n    return", "¿Qué? 東京 🙂 <|end_of_text|>"]


def trained_with(settings: str, folder: Path) -> Path:
    """Train a small job from the repository's root; returns the folder of its checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = load_config([*JOB, *settings.split(), "--job.dump_folder", str(folder)])
        assert Trainer(config, init_world(config.parallelism)).train() == 0
    return folder / "checkpoint"


def trained(variant: str, sessions: pytest.TempPathFactory) -> Path:
    """The checkpoint of a variant, made once per session."""
    folder = sessions.getbasetemp() / f"trained-{variant.replace(' ', '-')}"
    if not folder.exists():
        trained_with(VARIANTS[variant], folder)
    return folder / "checkpoint/step-4"


def exported_in_shards(variant: str, sessions: pytest.TempPathFactory) -> Path:
    """The export of `trained`, made once per session."""
    folder = sessions.getbasetemp() / f"exported-{variant.replace(' ', '-')}"
    if not folder.exists():
        checkpoint = trained(variant, sessions)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            export_checkpoint(checkpoint, folder, max_shard_bytes=300_000, license_name="bsd-3-clause")
    return folder
