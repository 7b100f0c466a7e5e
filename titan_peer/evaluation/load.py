"""A checkpoint as a model to evaluate."""

from __future__ import annotations

from pathlib import Path

import torch

from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.distributed.parallelize import autocast, compute_dtype
from titan_peer.evaluation.language_model import LanguageModel
from titan_peer.inference.generator import Generator


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {name}: there is no CUDA device here; use cpu")
    return device


def load_language_model(
    checkpoint: str | Path,
    *,
    device: str,
    batch_size: int,
    max_new_tokens: int,
    precision: str = "auto",
    ema: bool = False,
) -> tuple[LanguageModel, JobConfig]:
    """Open a checkpoint (as `find_checkpoint` takes it): the model, and the job that trained it.

    Args:
        precision: as training.mixed_precision_param: auto, bfloat16 or float32.
        ema: take the moving averages of the weights.
    Raises:
        UserError: the folder is not an undamaged checkpoint, or there is no such device.
    """
    place = choose_device(device)
    model, job, tokenizer = load_model_for_inference(checkpoint, device=place, ema=ema)
    generator = Generator(model, tokenizer, max_batch_size=batch_size, compile=False)
    context = autocast(place, compute_dtype(precision, place))
    return LanguageModel(generator, max_new_tokens, batch_size, context), job
