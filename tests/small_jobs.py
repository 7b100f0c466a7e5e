"""A job of a few seconds, and the content of its checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable", "false"]
SMALL += ["--validation.enable", "false", "--training.mixed_precision_param", "float32", "--training.gc_freq", "0"]
SMALL += ["--training.seq_len", "64", "--training.local_batch_size", "2", "--metrics.log_freq", "1"]
SMALL += ["--model.dim", "64", "--model.n_layers", "2", "--model.peer.num_experts", "1024"]
SMALL += ["--model.peer.product_key_dim", "32", "32", "--training.steps", "6", "--checkpoint.interval", "2"]


def trainer(dump_folder: Path, *arguments: object) -> Trainer:
    config = load_config([*SMALL, "--job.dump_folder", str(dump_folder), *map(str, arguments)])
    return Trainer(config, init_world(config.parallelism))


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the library's own converter rather than by our reader."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, f"{folder}/all.pt")
        return torch.load(f"{folder}/all.pt", weights_only=True)
