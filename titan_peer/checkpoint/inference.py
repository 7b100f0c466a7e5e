"""A checkpoint opened for inference: by one process, without an optimizer, a mesh or a compiler."""

from __future__ import annotations

import logging
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
from titan_peer.checkpoint.folder import CONFIG
from titan_peer.common.errors import UserError
from titan_peer.common.host_memory import prefer_huge_pages
from titan_peer.config.job import JobConfig
from titan_peer.config.saved_job import read_saved_job
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer
from titan_peer.distributed.parallelize import autocast, matrices
from titan_peer.model import EXPERT_TABLES, Transformer, rope_table

logger = logging.getLogger("titan_peer")


def load_model_for_inference(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap_tables: bool = False,
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
    Raises:
        UserError: the folder is not a checkpoint, or is damaged; the message names the file.
    """
    device = torch.device(device)
    if mmap_tables and device.type != "cpu":
        raise UserError(f"mmap_tables = true: tables of the device {device} cannot be mapped; use device cpu")
    folder = find_checkpoint(folder, "checkpoint")
    require_sound_model(folder, checksums=not mmap_tables)
    job = read_saved_job(folder / CONFIG)
    tokenizer = load_tokenizer(stored_tokenizer_path(folder, job.model.tokenizer_path))
    with torch.device("meta"):
        model = Transformer(job.model)
    weights = _inference_weights(folder, model, device, dtype or torch.float32, mmap_tables)
    model.load_state_dict(weights, strict=False, assign=True)
    if job.model.tie_embeddings:
        head = model.tok_embeddings.weight
        model.output.weight = head if dtype in (None, head.dtype) else nn.Parameter(head.to(dtype))
    model.rope = rope_table(job.model.mla, job.model.max_seq_len, device)
    if dtype not in (None, torch.float32):
        model.precision = autocast(device, dtype)
    model.requires_grad_(False).eval()
    return model, job, tokenizer


def require_sound_model(folder: Path, *, checksums: bool = True) -> None:
    """Raise UserError unless the checkpoint's files that inference needs are whole; the optimizer's are not read.

    Args:
        checksums: False compares sizes only.
    """
    try:
        reader = SafeReader(folder)
        stored_shapes(reader)
        verify(folder, checksums=checksums, without=files_without(reader, "model."))
    except DamagedCheckpointError as damage:
        raise UserError(f"{folder}: the checkpoint is damaged: {damage}") from None


def _inference_weights(
    folder: Path, model: Transformer, device: torch.device, dtype: torch.dtype, mmap_tables: bool
) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model on the meta device, with the checkpoint's values."""
    reader = SafeReader(folder)
    multiplied = matrices(model)
    low_precision = {name for name, parameter in model.named_parameters() if parameter in multiplied}
    tied = {"output.weight"} if model.args.tie_embeddings else set()
    prefix = "model."
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
                mapped[name] = map_tensor(reader, f"model.{name}")
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
