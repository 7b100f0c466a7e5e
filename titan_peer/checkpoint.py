"""The checkpoints of a job: save, verify, load, retain; and open one for inference.

`step-N` is complete or not there (checkpoint_saving.py), a load verifies it first, and reading one runs no code of its own
(checkpoint_files.py).
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_peer.checkpoint_files import (
    CONFIG,
    TOKENIZER,
    TRAIN_STATE,
    DamagedCheckpointError,
    SafeReader,
    map_tensor,
    read_tensors,
    read_tokenizer_files,
    saved_steps,
    stored_shapes,
    stored_tokenizer_path,
    verify,
)
from titan_peer.checkpoint_saving import BackgroundSave, CheckpointSaveError, Ranks, drop_old, write_checkpoint
from titan_peer.config import JobConfig, load_config
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer
from titan_peer.errors import UserError
from titan_peer.float8 import master_weight
from titan_peer.host_memory import prefer_huge_pages
from titan_peer.model import Transformer, rope_table
from titan_peer.optimizer import Optimizers

logger = logging.getLogger("titan_peer")


class Checkpointer:
    """The checkpoints of one job: when to wait, what to keep, where to start from.

    Args:
        job: settled, as it is to be stored in every checkpoint.
        model, optimizers: on this process; saved from and loaded into.
    Raises:
        UserError: the folder of the checkpoints cannot be written.
    """

    def __init__(self, job: JobConfig, model: nn.Module, optimizers: Optimizers) -> None:
        self.job, self.settings = job, job.checkpoint
        self.folder = Path(job.job.dump_folder) / self.settings.folder
        self.model, self.optimizers = model, optimizers
        self._background = BackgroundSave() if self.settings.async_mode == "async" else None
        self._documents = {CONFIG: job.to_toml().encode()}
        # read now: the checkpoint must hold the tokenizer the job began with
        for name, content in read_tokenizer_files(job.model.tokenizer_path).items():
            self._documents[f"{TOKENIZER}/{name}"] = content
        self.saved_step = 0
        """Of the newest checkpoint of this run that is complete, or of the one it resumed from; 0: none."""
        self._newly_saved: list[tuple[int, Path]] = []
        if self.settings.enable:
            self._require_writable_folder()

    @cached_property
    def _ranks(self) -> Ranks:
        return Ranks()

    def _require_writable_folder(self) -> None:
        def create_a_file() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()

        try:
            self._ranks.all_do(create_a_file)
        except CheckpointSaveError as error:
            raise UserError(f"checkpoint.folder = {self.settings.folder}: cannot be written: {error}") from None

    # ---- save

    def save(self, step: int, train_state: dict[str, Any], *, wait: bool, model_only: bool = False) -> None:
        """Save `step-N`, then drop old checkpoints. Called by every process between two steps.

        With `checkpoint.async_mode = "async"` and `wait` false it returns when the copying has begun:
        `wait_until_copied` must be called before parameters or optimizer state change.

        Args:
            wait: return when the checkpoint is on disk. Otherwise a failure is logged as an error and training goes on.
            model_only: only the model, in checkpoint.export_dtype.
        Raises:
            CheckpointSaveError: with `wait`, when it could not be written; on every process.
        """
        start = time.perf_counter()
        self.finish()
        documents = dict(self._documents)
        if model_only:
            tensors = self._exported_model()
            train_state = {**train_state, "model_only": True}
        else:
            tensors = self._tensors()
        documents[TRAIN_STATE] = json.dumps(train_state, indent=1).encode()

        def write(tensors: dict[str, Tensor]) -> None:
            try:
                folder = write_checkpoint(self.folder, step, tensors, documents, self._ranks)
            except CheckpointSaveError as error:
                if self._ranks.is_first:
                    logger.error("the checkpoint of step %d could not be written: %s", step, error)
                raise
            self.saved_step = step
            self._newly_saved.append((step, folder))
            if self._ranks.is_first:
                self._drop_old(step)
                beside = "" if wait or self._background is None else " beside the training"
                logger.info("saved %s in %.1f s%s", folder, time.perf_counter() - start, beside)

        if self._background is not None and not wait:
            self._background.start(tensors, self._buffers(), write)
            return
        try:
            write(tensors)
        except CheckpointSaveError:
            if wait:
                raise

    def wait_until_copied(self) -> None:
        """Return when parameters and optimizer state may change: an asynchronous save has copied them."""
        if self._background is not None:
            self._background.wait_until_copied()

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the asynchronous save that is running, if any; its failure has been logged.

        Raises:
            TimeoutError: it has not ended within `timeout` seconds.
        """
        if self._background is not None:
            with suppress(CheckpointSaveError):
                self._background.finish(timeout)

    def newly_saved(self) -> list[tuple[int, Path]]:
        """Step and folder of the checkpoints that have become complete since the last call."""
        saved, self._newly_saved = self._newly_saved, []
        return saved

    def _drop_old(self, step: int) -> None:
        try:
            drop_old(self.folder, step, self.settings.keep_latest_k, self.settings.keep_every_n_steps)
        except OSError as error:
            logger.error("old checkpoints could not be removed: %s", error)

    def _buffers(self) -> set[str]:
        return {f"model.{name.replace(_CHECKPOINT_PREFIX, '')}" for name, _ in self.model.named_buffers()}

    def _exported_model(self) -> dict[str, Tensor]:
        dtype, buffers = getattr(torch, self.settings.export_dtype), self._buffers()
        model = {name: tensor for name, tensor in self._tensors().items() if name.startswith("model.")}
        return {name: tensor if name in buffers else tensor.to(dtype) for name, tensor in model.items()}

    def _tensors(self) -> dict[str, Tensor]:
        model: dict[str, Any] = get_model_state_dict(self.model)
        tensors: dict[str, Any] = {f"model.{name}": master_weight(value) for name, value in model.items()}
        tensors.update({f"optimizer.{name}": tensor for name, tensor in self.optimizers.named_state()})
        tensors.update(_random_states())
        return tensors

    # ---- load

    def load(self) -> dict[str, Any] | None:
        """Load what the job starts from into model, optimizers and random states. Called by every process.

        In this order: the step checkpoint.load_step of the job's own folder (-1: its newest sound checkpoint);
        checkpoint.initial_load_path; nothing.

        Returns:
            The train_state it was saved with, less what checkpoint.exclude_from_loading names; None for a fresh start.
        Raises:
            UserError: the step is not there, no checkpoint is sound, or the checkpoint does not fit the job.
        """
        steps = self._ranks.first_does(lambda: saved_steps(self.folder))
        load_step = self._load_step(steps)
        if load_step > 0 and load_step not in steps:
            raise UserError(f"checkpoint.load_step = {load_step}: {self.folder} has the steps {steps}")
        if load_step != 0 and steps:
            return self._load_own(steps, load_step)
        state = self._load_initial() if self.settings.initial_load_path else None
        self._set_aside([step for step in steps if step > (state or {}).get("step", 0)], "superseded")
        return state

    def _load_step(self, steps: list[int]) -> int:
        """The step to load; where torchrun has restarted the job, a step that it began with is not gone back to."""
        load_step, restarts = self.settings.load_step, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return -1 if restarts and load_step >= 0 and max(steps, default=0) > load_step else load_step

    def _load_own(self, steps: list[int], load_step: int) -> dict[str, Any]:
        if self.settings.initial_load_path and self._ranks.is_first:
            logger.info("checkpoint.initial_load_path is not used: %s has checkpoints", self.folder)
        damaged = []
        for step in [load_step] if load_step > 0 else steps[::-1]:
            folder = self.folder / f"step-{step}"
            damage = self._damage(folder)
            if not damage:
                break
            damaged.append(step)
            if self._ranks.is_first:
                logger.error("checkpoint %s is damaged and will not be used: %s", folder, damage)
        else:
            names = ", ".join(f"step-{step}" for step in damaged)
            raise UserError(
                f"no sound checkpoint among {names} in {self.folder}: {damage}; choose another by checkpoint.load_step, "
                "or start anew with --checkpoint.load_step 0"
            )
        chosen = load_step > 0
        state = self._load(folder, excluded=self.settings.exclude_from_loading if chosen else [])
        if state.get("model_only") and state["step"] < self.job.training.steps:
            raise UserError(
                f"{folder} holds only the model (checkpoint.last_save_model_only) and cannot be resumed; start from it with "
                f"--checkpoint.initial_load_path {folder} in another job.dump_folder, or resume an earlier step with "
                "--checkpoint.load_step"
            )
        self.saved_step = state.get("step", 0)
        self._set_aside(damaged, "damaged")
        if chosen:
            self._set_aside([step for step in steps if step > state.get("step", 0)], "superseded")
        return state

    def _load_initial(self) -> dict[str, Any] | None:
        folder = Path(self.settings.initial_load_path)
        key = f"checkpoint.initial_load_path = {folder}"
        require_checkpoint(folder, key)
        if damage := self._damage(folder):
            raise UserError(f"{key}: the checkpoint is damaged: {damage}")
        model_only = self.settings.initial_load_model_only
        state = self._load(folder, excluded=self.settings.exclude_from_loading, model_only=model_only)
        if self._ranks.is_first:
            logger.info("started from %s%s", folder, " (the model only)" if model_only else "")
        if not model_only and state.get("model_only"):
            raise UserError(f"{key}: holds only the model; needs checkpoint.initial_load_model_only = true")
        return None if model_only else state

    def _damage(self, folder: Path) -> str:
        """What is wrong with a checkpoint's files, as all processes together find it; empty: nothing."""
        try:
            share = slice(self._ranks.rank, None, self._ranks.size)
            verify(folder, share=share)
            stored_shapes(SafeReader(folder))
            damage = ""
        except DamagedCheckpointError as error:
            damage = str(error)
        return next(filter(None, self._ranks.all_do(lambda: damage)), "")

    def _load(self, folder: Path, *, excluded: list[str], model_only: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))
        stored = stored_shapes(SafeReader(folder))
        tensors = self._tensors()
        if model_only or state.get("model_only"):
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        # Random states belong to a process; with other processes than at the save, those without one keep their seed.
        tensors = {name: t for name, t in tensors.items() if name in stored or not name.startswith("rng.")}
        for pattern in excluded:
            tensors = _without(pattern, tensors, state)
        read_tensors(folder, tensors, f"the settings it was saved with are in {folder / CONFIG}")
        for name, tensor in tensors.items():
            if name.startswith("rng."):
                _set_random_state(name, tensor)
        return state

    def _set_aside(self, steps: list[int], why: str) -> None:
        """Rename checkpoints that are not this run's past, so that nothing takes them for it; nothing is removed."""

        def rename() -> None:
            for step in steps:
                folder = self.folder / f"step-{step}"
                names = (folder.with_name(f"{folder.name}.{why}{n}") for n in ("", *(f"-{i}" for i in range(2, 1000))))
                target = next(name for name in names if not name.exists())
                folder.rename(target)
                logger.warning("renamed %s to %s", folder, target.name)

        try:
            self._ranks.first_does(rename)
        except CheckpointSaveError as error:
            raise UserError(f"checkpoint.folder = {self.settings.folder}: cannot be written: {error}") from None


# What checkpoint.exclude_from_loading calls parts of the checkpoint, beside patterns of tensor names.
_GROUPS = {"model": "model.*", "optimizer": "optimizer.*", "rng": "rng.*"}
_STATE_KEYS = {"dataloader": ("data",), "train_state": ("step", "tokens_seen")}


def _without(name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors but those that an entry of checkpoint.exclude_from_loading names; keys are taken out of `state`."""
    if name in _STATE_KEYS:
        for key in _STATE_KEYS[name]:
            state.pop(key, None)
        return tensors
    kept = {key: t for key, t in tensors.items() if not fnmatch.fnmatchcase(key, _GROUPS.get(name, name))}
    if len(kept) == len(tensors):
        raise UserError(
            f"checkpoint.exclude_from_loading: {name!r} matches nothing; allowed: {', '.join([*_GROUPS, *_STATE_KEYS])} "
            f"or a pattern of tensor names such as {next(iter(tensors), 'model.*')}"
        )
    return kept


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
    require_checkpoint(folder, str(folder))
    try:
        verify(folder, checksums=not mmap_tables)
        stored_shapes(SafeReader(folder))
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


def require_checkpoint(folder: Path, key: str) -> None:
    """Raise UserError, with `key` for what was given, unless a folder looks like a checkpoint."""
    if (folder / TRAIN_STATE).is_file():
        return
    inside = next((f for f in (folder, folder / "checkpoint") if saved_steps(f)), None)
    if inside is not None:
        newest = inside / f"step-{saved_steps(inside)[-1]}"
        raise UserError(f"{key}: is not a checkpoint itself; the newest in it is {newest}")
    why = f"has no {TRAIN_STATE}" if folder.is_dir() else "is not there" if not folder.exists() else "is not a folder"
    raise UserError(f"{key}: {why}; give a folder <job.dump_folder>/checkpoint/step-N")


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
        is_table = name.rpartition(".")[2] in ("expert_down", "expert_up")
        if mmap_tables and is_table:
            table = map_tensor(reader, f"model.{name}")
            if table is not None:
                mapped[name] = table
                continue
            logger.warning("%s: %s is stored in parts and is loaded, not mapped", folder, name)
        if name not in tied:
            weights[name] = torch.empty_like(tensor, device=device, dtype=dtype if name in parameters else tensor.dtype)
        if is_table:
            prefer_huge_pages(weights[name])
    advice = "it was saved by another version of the model"
    read_tensors(folder, {f"model.{name}": t for name, t in weights.items()}, advice, no_dist=True)
    return weights | mapped
