"""A checkpoint opened for inference: by one process, without an optimizer, a mesh or a compiler."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.checkpoint.files import (
    DamagedCheckpointError,
    NotMappableError,
    SafeReader,
    files_without,
    map_tensor,
    misfits,
    read_tensors,
    stored_shapes,
    stored_tokenizer_path,
    verify,
)
from titan_peer.checkpoint.folder import AVERAGE, CONFIG, MODEL
from titan_peer.common.errors import UserError
from titan_peer.common.host_memory import prefer_huge_pages
from titan_peer.config.job import JobConfig
from titan_peer.config.saved_job import read_saved_job
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer
from titan_peer.distributed.parallelize import autocast, matrices
from titan_peer.inference.generator import Generator
from titan_peer.model import EXPERT_TABLES, Transformer, rope_table, table_parameters

logger = logging.getLogger("titan_peer")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model_for_inference(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap_tables: bool = False,
    ema: bool = False,
) -> tuple[Transformer, JobConfig, Tokenizer]:
    """Open a checkpoint (see `find_checkpoint`): the model in eval mode, the job that trained it, its tokenizer.

    Every process loads the whole model; nothing is compiled or sharded.

    Args:
        device: where the parameters are put.
        dtype: dtype of the expert tables and of the matrices, the tensors that mixed-precision training rounds; None:
            float32, in which they are trained. Gains, embeddings, sub-keys and buffers, which training does not round,
            stay float32.
        mmap_tables: on a CPU, map the expert tables from the checkpoint's files: they are read when they are used, and
            processes that map them share the memory. Tables keep their stored dtype. File sizes are compared, checksums
            are not, since that would read everything. Tables that several processes saved in parts are loaded, not
            mapped.
        ema: take the moving averages of the weights and running statistics (training.ema_decay) in place of them.
    Raises:
        UserError: the folder is not a checkpoint, has no averages, or is damaged; the message names the file.
    """
    device = torch.device(device)
    if mmap_tables and device.type != "cpu":
        raise UserError(f"mmap_tables = true: tables of the device {device} cannot be mapped; use device cpu")
    folder = find_checkpoint(folder, "checkpoint")
    require_sound_model(folder, checksums=not mmap_tables, ema=ema)
    job = read_saved_job(folder / CONFIG)
    tokenizer = load_tokenizer(stored_tokenizer_path(folder, job.model.tokenizer_path))
    with torch.device("meta"):
        model = Transformer(job.model)
    weights = _inference_weights(folder, model, device, dtype or torch.float32, mmap_tables, ema)
    model.load_state_dict(weights, strict=False, assign=True)
    if job.model.tie_embeddings:
        head = model.tok_embeddings.weight
        model.output.weight = head if dtype in (None, head.dtype) else nn.Parameter(head.to(dtype))
    model.rope = rope_table(job.model.mla, job.model.max_seq_len, device)
    if dtype not in (None, torch.float32):
        model.precision = autocast(device, dtype)
    model.requires_grad_(False).eval()
    return model, job, tokenizer


def load_generator(
    checkpoint: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tables: str = "device",
    max_batch_size: int = 32,
    compile: bool | None = None,
    ema: bool = False,
) -> Generator:
    """Open the checkpoint `checkpoint`, a folder step-N.

    Args:
        device: as torch names it; auto: a GPU if there is one.
        dtype: of the weights, float32 or bfloat16; auto: bfloat16 on CUDA and float32 on a CPU.
        tables: where the expert tables are: "device", with the model; "host", in the CPU's memory; "mapped", in the
            checkpoint's file.
        max_batch_size, compile: as for `Generator`.
        ema: as for `load_model_for_inference`.
    Raises:
        UserError: there is no such device, or the checkpoint is damaged or has no averages.
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
        checkpoint, device=first, dtype=weights, mmap_tables=tables == "mapped", ema=ema
    )
    if first != target:
        move_all_but_tables(model, target)
    logger.info(
        "%s: %s%s parameters, %s; loaded in %.1f s",
        checkpoint,
        "moving averages of " if ema else "",
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


def require_sound_model(folder: Path, *, checksums: bool = True, ema: bool = False) -> None:
    """Raise UserError unless the checkpoint's files that inference needs are whole; the optimizer's are not read.

    Args:
        checksums: False compares sizes only.
        ema: the moving averages of the weights are needed, and not the weights.
    """
    prefix = AVERAGE if ema else MODEL
    try:
        reader = SafeReader(folder)
        if ema and not any(name.startswith(AVERAGE) for name in stored_shapes(reader)):
            raise UserError(f"{folder}: holds no averaged weights; a job with training.ema_decay saves them")
        verify(folder, checksums=checksums, without=files_without(reader, prefix))
    except DamagedCheckpointError as damage:
        raise UserError(f"{folder}: the checkpoint is damaged: {damage}") from None


def _inference_weights(
    folder: Path, model: Transformer, device: torch.device, dtype: torch.dtype, mmap_tables: bool, ema: bool
) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model on the meta device, with the checkpoint's values."""
    reader = SafeReader(folder)
    multiplied = matrices(model)
    low_precision = {name for name, parameter in model.named_parameters() if parameter in multiplied}
    tied = {"output.weight"} if model.args.tie_embeddings else set()
    prefix = AVERAGE if ema else MODEL
    stored = {n.removeprefix(prefix): s for n, s in stored_shapes(reader).items() if n.startswith(prefix)}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # a tied head is the embedding, whether or not the checkpoint contains a head
    if problem := misfits(
        {n: s for n, s in wanted.items() if n not in tied}, {n: s for n, s in stored.items() if n not in tied}
    ):
        raise UserError(f"{folder}: {problem}; its weights and its {CONFIG} are not of the same model")
    weights: dict[str, Tensor] = {}
    mapped: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        is_table = name.rpartition(".")[2] in EXPERT_TABLES
        if mmap_tables and is_table:
            try:
                mapped[name] = map_tensor(reader, f"{prefix}{name}")
                continue
            except NotMappableError as reason:
                logger.warning("%s: %s %s and is loaded, not mapped", folder, name, reason)
        if name not in tied:
            cast = is_table or name in low_precision
            weights[name] = torch.empty_like(tensor, device=device, dtype=dtype if cast else tensor.dtype)
        if is_table:
            prefer_huge_pages(weights[name])
    read_tensors(folder, {f"{prefix}{name}": t for name, t in weights.items()}, no_dist=True)
    return weights | mapped
