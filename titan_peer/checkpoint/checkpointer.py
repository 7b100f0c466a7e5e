"""The checkpoints of a job: save, verify, load, retain.

`step-N` is either complete or absent (saving.py); a load verifies it first, and reading one executes no code from it
(files.py).
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.checkpoint.compare import (
    changed_settings,
    described,
    require_known_entries,
    require_same_function,
    require_same_tokenizer,
)
from titan_peer.checkpoint.files import (
    DamagedCheckpointError,
    SafeReader,
    misfits,
    read_tensors,
    read_tokenizer_files,
    stored_shapes,
    stored_tokenizer_path,
    verify,
)
from titan_peer.checkpoint.folder import AVERAGE, CONFIG, MODEL, TOKENIZER, TRAIN_STATE, UPDATES, saved_steps
from titan_peer.checkpoint.removal import Retention, restore_replaced
from titan_peer.checkpoint.saving import BackgroundSave, CheckpointSaveError, Ranks, write_checkpoint
from titan_peer.common.errors import Problems, TransientError, UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.saved_job import read_saved_job
from titan_peer.distributed.collectives import ProcessesFailedError
from titan_peer.distributed.float8 import master_weight
from titan_peer.distributed.world import joined_as
from titan_peer.optim.optimizers import Optimizers

logger = logging.getLogger("titan_peer")


class Checkpointer:
    """The checkpoints of one job: when to wait, what to keep, where to start from.

    Args:
        job: the resolved job, which is stored in every checkpoint.
        model, optimizers: those of this process; saved from and loaded into.
    Raises:
        UserError: the folder of the checkpoints cannot be written to.
    """

    def __init__(self, job: JobConfig, model: nn.Module, optimizers: Optimizers) -> None:
        self.job, self.settings = job, job.checkpoint
        self.folder = Path(job.job.dump_folder) / self.settings.folder
        self.model, self.optimizers = model, optimizers
        self._background = BackgroundSave() if self.settings.async_mode == "async" else None
        self._retention = Retention(self.folder, self.settings.keep_latest_k, self.settings.keep_every_n_steps)
        self._documents: dict[str, bytes] = {}
        self.saved_step = 0
        """The step of this run's newest complete checkpoint, or of the one it resumed from; 0: none."""
        self._newly_saved: list[tuple[int, Path]] = []
        self._ranks.all_do(self._read_documents)
        if self.settings.enable:
            self._require_writable_folder()

    @cached_property
    def _ranks(self) -> Ranks:
        return Ranks()

    def _read_documents(self) -> None:
        """Read the files that every checkpoint contains; now, since it must hold the tokenizer that the job started
        with."""
        require_known_entries(self.settings.allow_changed)
        self._documents[CONFIG] = self.job.to_toml().encode()
        for name, content in read_tokenizer_files(self.job.model.tokenizer_path).items():
            self._documents[f"{TOKENIZER}/{name}"] = content

    def _require_writable_folder(self) -> None:
        def create_a_file() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()

        try:
            self._ranks.all_do(create_a_file)
        except ProcessesFailedError as error:
            raise self._cannot_be_written(error) from None

    def _cannot_be_written(self, error: ProcessesFailedError) -> UserError | TransientError:
        kind = TransientError if error.is_transient else UserError
        return kind(f"checkpoint.folder = {self.settings.folder}: cannot be written to: {error}")

    # ---- save

    def save(self, step: int, train_state: dict[str, Any], *, wait: bool, model_only: bool = False) -> None:
        """Save `step-N`, then remove old checkpoints. Every process must call it, between two steps.

        With `checkpoint.async_mode = "async"` and `wait` false it returns when copying has started: `wait_until_copied`
        must be called before parameters or optimizer state change.

        Args:
            wait: return only when the checkpoint is on disk. Otherwise a failure is logged as an error and training
                goes on.
            model_only: save only the model and its average, in checkpoint.export_dtype.
        Raises:
            CheckpointSaveError: with `wait`, if the checkpoint could not be written; on every process.
        """
        start = time.perf_counter()
        self.finish()
        documents = dict(self._documents)
        if model_only:
            train_state = {**train_state, "model_only": True}
        tensors = self._exported_model if model_only else self._tensors
        documents[TRAIN_STATE] = json.dumps(train_state, indent=1).encode()

        def write(tensors: Callable[[], dict[str, Tensor]]) -> None:
            if self._ranks.is_first:
                self._retention.clear_leftovers()
            try:
                folder = write_checkpoint(self.folder, step, tensors, documents, self._ranks)
            except CheckpointSaveError as error:
                if self._ranks.is_first:
                    logger.error("the checkpoint of step %d could not be written: %s", step, error)
                raise
            self.saved_step = step
            self._newly_saved.append((step, folder))
            if self._ranks.is_first:
                self._retention.drop_old(step)
                beside = "" if wait or self._background is None else " in the background"
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
        """Wait until parameters and optimizer state may change, that is, until an asynchronous save has copied them."""
        if self._background is not None:
            self._background.wait_until_copied()

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the asynchronous save that is running, if any; a failure of it is logged, not raised.

        Raises:
            TimeoutError: the save has not ended within `timeout` seconds.
        """
        if self._background is not None:
            with suppress(CheckpointSaveError):
                self._background.finish(timeout)

    def newly_saved(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint that has been completed since the last call."""
        saved, self._newly_saved = self._newly_saved, []
        return saved

    def _buffers(self) -> set[str]:
        return {f"model.{name.replace(_CHECKPOINT_PREFIX, '')}" for name, _ in self.model.named_buffers()}

    def _exported_model(self) -> dict[str, Tensor]:
        dtype = getattr(torch, self.settings.export_dtype)
        kept = self._buffers() | {name.replace(MODEL, AVERAGE, 1) for name in self._buffers()}
        model = {name: tensor for name, tensor in self._tensors().items() if name.startswith((MODEL, AVERAGE))}
        return {name: tensor if name in kept else tensor.to(dtype) for name, tensor in model.items()}

    def _tensors(self) -> dict[str, Tensor]:
        model: dict[str, Any] = get_model_state_dict(self.model)
        tensors: dict[str, Any] = {f"{MODEL}{name}": master_weight(value) for name, value in model.items()}
        tensors.update({f"optimizer.{name}": tensor for name, tensor in self.optimizers.named_state()})
        if (average := self.optimizers.average) is not None:
            tensors.update({f"{AVERAGE}{name}": tensor for name, tensor in average.named_tensors().items()})
            tensors[UPDATES] = average.updates
        tensors.update(_random_states())
        return tensors

    # ---- load

    def load(self) -> dict[str, Any] | None:
        """Load what the job starts from into model, optimizers and random states. Every process must call it.

        The first of these that exists: the step checkpoint.load_step in the job's own folder (-1: its newest undamaged
        checkpoint); checkpoint.initial_load_path; otherwise nothing is loaded.

        Returns:
            The train_state it was saved with, without what checkpoint.exclude_from_loading names; None for a fresh
            start.
        Raises:
            UserError: the step does not exist, all checkpoints are damaged, or the checkpoint does not fit the job.
        """
        steps = self._ranks.first_does(self._own_steps)
        load_step = self._load_step(steps)
        if load_step > 0 and load_step not in steps:
            raise UserError(f"checkpoint.load_step = {load_step}: {self.folder} has the steps {steps}")
        if load_step != 0 and steps:
            return self._load_own(steps, load_step)
        state = self._load_initial() if self.settings.initial_load_path else None
        self._set_aside([step for step in steps if step > (state or {}).get("step", 0)], "superseded")
        return state

    def _own_steps(self) -> list[int]:
        restore_replaced(self.folder)
        return saved_steps(self.folder)

    def _load_step(self, steps: list[int]) -> int:
        """The step to load: after a restart by torchrun the newest one, even if the job began with an older step."""
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
                f"all of {names} in {self.folder} are damaged: {damage}; choose another with checkpoint.load_step, "
                "or start from the beginning with --checkpoint.load_step 0"
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
        given = self.settings.initial_load_path
        folder = self._ranks.first_does(lambda: find_checkpoint(given, "checkpoint.initial_load_path ="))
        key = f"checkpoint.initial_load_path = {folder}"
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
        """What is wrong with a checkpoint's files, checked by all processes together; empty: nothing."""

        def look() -> str:
            try:
                verify(folder, share=slice(self._ranks.rank, None, self._ranks.size))
                stored_shapes(SafeReader(folder))
            except DamagedCheckpointError as error:
                return str(error)
            return ""

        return next(filter(None, self._ranks.all_do(look)), "")

    def _load(self, folder: Path, *, excluded: list[str], model_only: bool = False) -> dict[str, Any]:
        """Compare an undamaged checkpoint with the job, then load what is not excluded; returns its train_state."""
        compared: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self._ranks.all_do(lambda: compared.append(self._compare(folder, excluded, model_only)))
        ((state, tensors),) = compared
        read_tensors(folder, tensors)
        self._count_missed_steps(folder, tensors)
        self._begin_average(folder, tensors)
        self._ranks.all_do(lambda: _set_random_states(tensors))
        return state

    def _count_missed_steps(self, folder: Path, loaded: dict[str, Tensor]) -> None:
        """Rows of expert tables are up to date if the checkpoint does not say when they were last used."""
        missing = {n: t for n, t in self.optimizers.named_last_uses().items() if f"optimizer.{n}" not in loaded}
        self.optimizers.count_missed_steps_from_now(missing.values())
        if any(name.startswith("optimizer.") for name in loaded) and missing and self._ranks.is_first:
            logger.info(
                "%s does not say when expert rows were last used (optimizer.expert_catch_up was not in use): the steps "
                "that they miss count from here on",
                folder,
            )

    def _begin_average(self, folder: Path, loaded: dict[str, Tensor]) -> None:
        """Go on with the average of the weights that has been loaded, or start a new one."""
        if (average := self.optimizers.average) is None:
            return
        if UPDATES in loaded:
            average.loaded()
            return
        average.start_anew()
        if self._ranks.is_first:
            logger.info(
                "training.ema_decay: the average of the weights starts anew, since none is loaded from %s", folder
            )

    def _compare(self, folder: Path, excluded: list[str], model_only: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The checkpoint's train_state and the job's tensors that are to be filled from it, both without what is
        excluded.

        Raises:
            UserError: the checkpoint belongs to another model or tokenizer, or has other tensors.
        """
        saved, allowed = read_saved_job(folder / CONFIG), self.settings.allow_changed
        changes = changed_settings(saved, self.job)
        if model_only:
            changes = {key: change for key, change in changes.items() if key.startswith("model.")}
        if changes and self._ranks.is_first:
            logger.info("settings that differ from those that %s was saved with: %s", folder, described(changes))
        problems = Problems()  # what one of them advises is not enough if there is another
        if "model" not in excluded:
            stored_tokenizer = stored_tokenizer_path(folder, saved.model.tokenizer_path)
            job_tokenizer = self.job.model.tokenizer_path
            with problems.collected():
                require_same_function(folder, saved.model, self.job.model, allowed)
            with problems.collected():
                require_same_tokenizer(folder, stored_tokenizer, job_tokenizer, allowed)
        state: dict[str, Any] = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))
        wanted, stored = self._tensors(), stored_shapes(SafeReader(folder))
        # Random states belong to one process each; with more processes than at the save, the new ones keep their seed.
        wanted = {name: t for name, t in wanted.items() if name in stored or not name.startswith("rng.")}
        stored = {name: s for name, s in stored.items() if name in wanted or not name.startswith("rng.")}
        without = {f"optimizer.{name}" for name in self.optimizers.named_last_uses()} - stored.keys()
        wanted = {name: t for name, t in wanted.items() if name not in without}
        if self.job.model.tie_embeddings and not saved.model.tie_embeddings:
            del wanted[
                "model.output.weight"
            ]  # this tensor is the embedding, which must not be filled with the checkpoint's head
        left_out = _excluded(excluded, {*wanted, *stored}, state)
        if model_only or state.get("model_only"):
            left_out |= {name for name in (*wanted, *stored) if not name.startswith("model.")}
        # an average goes on whole, with the model that it is of, or not at all
        if UPDATES not in wanted.keys() & stored.keys() or any(n.startswith((MODEL, AVERAGE)) for n in left_out):
            left_out |= {name for name in (*wanted, *stored) if name.startswith((AVERAGE, UPDATES))}
        wanted = {name: t for name, t in wanted.items() if name not in left_out}
        stored = {name: s for name, s in stored.items() if name not in left_out}
        if problem := misfits({name: t.shape for name, t in wanted.items()}, stored):
            names = [n for n in (wanted | stored) if n not in wanted or tuple(wanted[n].shape) != stored.get(n)]
            advice = f"--checkpoint.exclude_from_loading {' '.join([*excluded, *names])}"
            few = len(names) <= _NAMED_IN_ADVICE
            problems.found.append(
                f"{folder} does not fit the job: {problem}; the settings it was saved with are in {folder / CONFIG}. Name "
                "what is not to be loaded in checkpoint.exclude_from_loading, together with checkpoint.initial_load_path "
                f"or checkpoint.load_step{f': {advice}' if few else ''}"
            )
        problems.refuse()
        return state, wanted

    def _set_aside(self, steps: list[int], why: str) -> None:
        """Rename checkpoints that do not belong to this run's history, so that none is mistaken for it; none is
        removed."""

        def rename() -> None:
            for step in steps:
                folder = self.folder / f"step-{step}"
                names = (folder.with_name(f"{folder.name}.{why}{n}") for n in ("", *(f"-{i}" for i in range(2, 1000))))
                target = next(name for name in names if not name.exists())
                folder.rename(target)
                logger.warning("renamed %s to %s", folder, target.name)

        try:
            self._ranks.first_does(rename)
        except ProcessesFailedError as error:
            raise self._cannot_be_written(error) from None


# Names of parts of a checkpoint in checkpoint.exclude_from_loading, besides patterns of tensor names.
_GROUPS = {"model": f"{MODEL}*", "optimizer": "optimizer.*", "ema": "ema[._]*", "rng": "rng.*"}
_NAMED_IN_ADVICE = 8  # tensors that do not fit; of more, the user finds a pattern
_STATE_KEYS = {"dataloader": ("data",), "train_state": ("step", "tokens_seen", "guard")}


def _excluded(entries: list[str], names: set[str], state: dict[str, Any]) -> set[str]:
    """The tensor names that entries of checkpoint.exclude_from_loading match; keys that they match are removed from
    `state`."""
    found: set[str] = set()
    for entry in entries:
        if entry in _STATE_KEYS:
            for key in _STATE_KEYS[entry]:
                state.pop(key, None)
            continue
        matching = set(fnmatch.filter(names, _GROUPS.get(entry, entry)))
        if not matching:
            raise UserError(
                f"checkpoint.exclude_from_loading: {entry!r} matches nothing; allowed: "
                f"{', '.join([*_GROUPS, *_STATE_KEYS])} or a pattern of tensor names such as {min(names, default='model.*')}"
            )
        found |= matching
    return found


def _random_states() -> dict[str, Tensor]:
    return dict(_named_random_states(joined_as()[0]))


def _named_random_states(rank: int) -> Iterator[tuple[str, Tensor]]:
    yield f"rng.{rank}.cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield f"rng.{rank}.cuda", torch.cuda.get_rng_state()


def _set_random_states(tensors: dict[str, Tensor]) -> None:
    for name, state in tensors.items():
        if name.startswith("rng."):
            (torch.cuda if name.endswith(".cuda") else torch).set_rng_state(state)
