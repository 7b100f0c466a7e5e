"""Save, find, verify, load and retain checkpoints; open one for inference.

A checkpoint is written under a hidden name and renamed when all of it is on disk, so `step-N` is complete or not there.
A load verifies the manifest first. Only tensors are stored, and the one pickled file of the format is read by an unpickler
that knows nothing but that format's own types (checkpoint_files.py).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_peer.checkpoint_files import (
    CONFIG,
    TOKENIZER,
    TRAIN_STATE,
    DamagedCheckpointError,
    SafeReader,
    manifest_entries,
    map_tensor,
    mismatch,
    read_tokenizer_files,
    saved_steps,
    stored_shapes,
    stored_tokenizer_path,
    sync,
    verify,
    write_manifest,
)
from titan_peer.config import JobConfig, load_config
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer
from titan_peer.errors import UserError
from titan_peer.model import Transformer, rope_table
from titan_peer.optimizer import Optimizers

logger = logging.getLogger("titan_peer")

_PARTIAL_FOLDER = re.compile(r"\.step-\d+\.partial")


class Checkpointer:
    """The checkpoints of one job."""

    def __init__(self, job: JobConfig, model: nn.Module, optimizers: Optimizers) -> None:
        self.folder = Path(job.job.dump_folder) / job.checkpoint.folder
        self.keep_latest_k = job.checkpoint.keep_latest_k
        self.model, self.optimizers = model, optimizers
        self._job_toml = job.to_toml()
        # read now: the checkpoint must hold the tokenizer the job began with
        self._tokenizer_files = read_tokenizer_files(job.model.tokenizer_path)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0

    def save(self, step: int, train_state: dict[str, Any]) -> Path:
        """Write `step-N` whole or not at all, then drop the oldest beyond keep_latest_k. Called by every process."""
        final, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        if self.is_first:
            for leftover in (p for p in self.folder.glob(".step-*") if _PARTIAL_FOLDER.fullmatch(p.name)):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        self._wait_for_all()
        with _without_single_process_warning():
            dcp.save(
                self._tensors(),
                storage_writer=FileSystemWriter(partial, sync_files=False),
                no_dist=not dist.is_initialized(),
            )
        if self.is_first:
            (partial / TRAIN_STATE).write_text(json.dumps(train_state, indent=1))
            (partial / CONFIG).write_text(self._job_toml)
            if self._tokenizer_files:
                (partial / TOKENIZER).mkdir()
            for name, content in self._tokenizer_files.items():
                (partial / TOKENIZER / name).write_bytes(content)
            write_manifest(partial, manifest_entries(partial, (p for p in partial.rglob("*") if p.is_file())))
            if final.exists():  # a damaged one that a resume passed over
                shutil.rmtree(final)
            partial.rename(final)
            sync(self.folder)
            self._drop_old()
        self._wait_for_all()
        return final

    def load(self, load_step: int) -> dict[str, Any] | None:
        """Load the checkpoint of `load_step` (-1: the newest sound one, 0: none) into model, optimizers and RNG.

        Returns:
            The train_state it was saved with, or None when there is nothing to resume.
        Raises:
            UserError: the step is not there, or no checkpoint in the folder is sound.
        """
        steps = saved_steps(self.folder)
        if load_step == 0 or (load_step == -1 and not steps):
            return None
        if load_step > 0 and load_step not in steps:
            raise UserError(f"checkpoint.load_step = {load_step}: {self.folder} has the steps {steps}")
        candidates = [load_step] if load_step > 0 else steps[::-1]
        for step in candidates:
            folder = self.folder / f"step-{step}"
            try:
                verify(folder)
            except DamagedCheckpointError as damage:
                logger.error("checkpoint %s is damaged and will not be used: %s", folder, damage)
                continue
            return self._load(folder)
        raise UserError(
            f"no sound checkpoint among {', '.join(f'step-{s}' for s in candidates)} in {self.folder}; remove them, "
            "or start anew with --checkpoint.load_step 0"
        )

    def _load(self, folder: Path) -> dict[str, Any]:
        train_state: dict[str, Any] = json.loads((folder / TRAIN_STATE).read_text())
        tensors = self._tensors()
        # Random states belong to a process; with other processes than at the save, those without one keep their seed.
        stored = stored_shapes(SafeReader(folder))
        tensors = {name: t for name, t in tensors.items() if name in stored or not name.startswith("rng.")}
        _read_tensors(folder, tensors, "resume with the model and optimizer settings of the run that saved it")
        for name, tensor in tensors.items():
            if name.startswith("rng."):
                _set_random_state(name, tensor)
        return train_state

    def _tensors(self) -> dict[str, Any]:
        tensors = {f"model.{name}": tensor for name, tensor in get_model_state_dict(self.model).items()}
        tensors.update({f"optimizer.{name}": tensor for name, tensor in self.optimizers.named_state()})
        tensors.update(_random_states())
        return tensors

    def _drop_old(self) -> None:
        steps = saved_steps(self.folder)
        for step in steps[: -self.keep_latest_k] if self.keep_latest_k else []:
            # renamed first, so that a kill during removal leaves no half checkpoint under a visible name
            doomed = self.folder / f".step-{step}.partial"
            (self.folder / f"step-{step}").rename(doomed)
            shutil.rmtree(doomed)

    @staticmethod
    def _wait_for_all() -> None:
        if dist.is_initialized():
            dist.barrier()


def _read_tensors(folder: Path, tensors: dict[str, Tensor], advice: str, *, no_dist: bool | None = None) -> None:
    """Fill tensors, by name, from a checkpoint; they keep their dtype and sharding.

    Raises:
        UserError: the checkpoint lacks one of them or has it in another shape; the message ends with `advice`.
    """
    reader = SafeReader(folder)
    problem = mismatch({name: tensor.shape for name, tensor in tensors.items()}, stored_shapes(reader))
    if problem is not None:
        raise UserError(f"{folder}: {problem}; {advice}")
    with _without_single_process_warning():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized() if no_dist is None else no_dist)


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """A single process is meant; the library warns of it at every save."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _random_states() -> dict[str, Tensor]:
    return dict(_named_random_states(dist.get_rank() if dist.is_initialized() else 0))


def _named_random_states(rank: int) -> Iterator[tuple[str, Tensor]]:
    yield f"rng.{rank}.cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield f"rng.{rank}.cuda", torch.cuda.get_rng_state()


def _set_random_state(name: str, state: Tensor) -> None:
    if name.endswith(".cuda"):
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


# --------------------------------------------------------------------------------------------------------------------
# Inference


def load_model_for_inference(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap_tables: bool = False,
) -> tuple[Transformer, JobConfig, Tokenizer]:
    """Open `<dump_folder>/checkpoint/step-N`: the model in eval mode, the job that trained it, its tokenizer.

    Every process loads the whole model; nothing is compiled or sharded.

    Args:
        device: where the parameters are put.
        dtype: of the parameters; None takes float32, the dtype they were trained in. Buffers stay float32.
        mmap_tables: on a CPU, use the expert tables where they lie in the checkpoint's files, read when they are used and
            shared by all processes that do so. Tables keep the dtype they are stored in; checksums, which would read
            everything, are not compared, sizes are. Not for tables that several processes saved in parts.
    Raises:
        UserError: the folder is no checkpoint, or is damaged; the message names the file.
    """
    folder, device = Path(folder), torch.device(device)
    if mmap_tables and device.type != "cpu":
        raise UserError(f"mmap_tables = true: tables of the device {device} cannot be mapped; use device cpu")
    _require_checkpoint(folder)
    try:
        verify(folder, checksums=not mmap_tables)
    except DamagedCheckpointError as damage:
        raise UserError(f"{folder}: the checkpoint is damaged: {damage}") from None
    job = load_config(["--job.config_file", str(folder / CONFIG)])
    tokenizer = load_tokenizer(stored_tokenizer_path(folder, job.model.tokenizer_path))
    with torch.device("meta"):
        model = Transformer(job.model)
    weights = _inference_weights(folder, model, device, dtype or torch.float32, mmap_tables)
    model.load_state_dict(weights, strict=False, assign=True)
    if job.model.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.rope = rope_table(job.model.mla, job.model.max_seq_len, device)
    model.requires_grad_(False).eval()
    return model, job, tokenizer


def _require_checkpoint(folder: Path) -> None:
    if (folder / TRAIN_STATE).is_file():
        return
    inside = next((f for f in (folder, folder / "checkpoint") if saved_steps(f)), None)
    if inside is not None:
        raise UserError(
            f"{folder}: is not a checkpoint itself; the newest in it is {inside / f'step-{saved_steps(inside)[-1]}'}"
        )
    why = f"has no {TRAIN_STATE}" if folder.is_dir() else "is not there" if not folder.exists() else "is not a folder"
    raise UserError(f"{folder}: {why}; give a folder <job.dump_folder>/checkpoint/step-N")


def _inference_weights(
    folder: Path, model: Transformer, device: torch.device, dtype: torch.dtype, mmap_tables: bool
) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model on the meta device, with the checkpoint's values."""
    reader = SafeReader(folder)
    parameters = {name for name, _ in model.named_parameters()}
    tied = {"output.weight"} if model.args.tie_embeddings else set()
    weights: dict[str, Tensor] = {}
    mapped: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if mmap_tables and name.rpartition(".")[2] in ("expert_down", "expert_up"):
            table = map_tensor(reader, f"model.{name}")
            if table is not None:
                mapped[name] = table
                continue
            logger.warning("%s: %s is stored in parts and is loaded, not mapped", folder, name)
        if name not in tied:
            weights[name] = torch.empty_like(tensor, device=device, dtype=dtype if name in parameters else tensor.dtype)
    _read_tensors(folder, {f"model.{name}": t for name, t in weights.items()}, "is it of this version?", no_dist=True)
    return weights | mapped
