"""A checkpoint opened as a generator of text, with its expert tables where the caller wants them."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.errors import UserError
from titan_peer.inference.generator import Generator
from titan_peer.model import Transformer, table_parameters

logger = logging.getLogger("titan_peer")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_generator(
    checkpoint: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tables: str = "device",
    max_batch_size: int = 32,
    compile: bool | None = None,
) -> Generator:
    """Open the checkpoint `checkpoint`, a folder step-N.

    Args:
        device: as torch names it; auto: a GPU if there is one.
        dtype: of the weights, float32 or bfloat16; auto: bfloat16 on CUDA and float32 on a CPU.
        tables: where the expert tables are: "device", with the model; "host", in the CPU's memory; "mapped", in the
            checkpoint's file.
        max_batch_size, compile: as for `Generator`.
    Raises:
        UserError: there is no such device, or the checkpoint is damaged.
    """
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto":
        name = device
    try:
        target = torch.device(name)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used: {str(error).splitlines()[0]}") from None
    weights = torch.bfloat16 if target.type == "cuda" else torch.float32
    if dtype != "auto":
        weights = _DTYPES[dtype]
    start = time.perf_counter()
    first = target if tables == "device" else torch.device("cpu")
    model, job, tokenizer = load_model_for_inference(
        checkpoint, device=first, dtype=weights, mmap_tables=tables == "mapped"
    )
    if first != target:
        move_all_but_tables(model, target)
    logger.info(
        "%s: %s parameters, %s; loaded in %.1f s",
        checkpoint,
        f"{sum(p.numel() for p in model.parameters()):,}",
        job.job.description or "no description",
        time.perf_counter() - start,
    )
    generator = Generator(model, tokenizer, max_batch_size=max_batch_size, compile=compile)
    logger.info(generator.decoder.report())
    return generator


def move_all_but_tables(model: Transformer, device: torch.device) -> None:
    """Move a model's parameters and buffers to a device; the expert tables stay where they are."""
    tables = table_parameters(model)
    for parameter in model.parameters():
        if parameter not in tables:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
