"""Save, find, verify, load and retain checkpoints.

A checkpoint is the folder `step-N`: tensors in torch.distributed.checkpoint's format, `train_state.json` (step, tokens,
data position) and, written last, `manifest.json` with the size and CRC-32 of every other file. It is written under a
hidden name and renamed when all of it is on disk, so `step-N` is complete or not there. A load verifies the manifest
first. Only tensors are stored, and the one pickled file of the format is read by an unpickler that knows nothing but
that format's own types.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_peer.errors import UserError
from titan_peer.optimizer import Optimizers

logger = logging.getLogger("titan_peer")

_STEP_FOLDER = re.compile(r"step-(\d+)")
_PARTIAL_FOLDER = re.compile(r"\.step-\d+\.partial")
MANIFEST, TRAIN_STATE = "manifest.json", "train_state.json"


class DamagedCheckpointError(Exception):
    """A checkpoint folder whose files are not what its manifest says."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the checkpoint format's index; refuses every type that is not part of that format."""

    _ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._ALLOWED or module.startswith("torch.distributed.checkpoint."):
            return super().find_class(module, name)
        raise DamagedCheckpointError(f"its .metadata asks for {module}.{name}, which no checkpoint contains")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Have the file's or folder's content on disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    _sync(manifest)
    _sync(folder)


def verify(folder: Path) -> None:
    """Raise DamagedCheckpointError unless every file is there with the size and CRC-32 of the manifest."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder / MANIFEST} cannot be read ({error})") from None
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedCheckpointError(f"{path} has {size:,} bytes, its manifest says {entry['bytes']:,}")
        if _crc32(path) != entry["crc32"]:
            raise DamagedCheckpointError(f"{path} has another CRC-32 than its manifest says")


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


class Checkpointer:
    """The checkpoints of one job."""

    def __init__(self, folder: Path, keep_latest_k: int, model: nn.Module, optimizers: Optimizers) -> None:
        self.folder, self.keep_latest_k = folder, keep_latest_k
        self.model, self.optimizers = model, optimizers
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
            _write_manifest(partial)
            if final.exists():  # a damaged one that a resume passed over
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.folder)
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
        reader = _Reader(folder)
        stored = reader.read_metadata().state_dict_metadata
        tensors = self._tensors()
        # Random states belong to a process; with other processes than at the save, those without one keep their seed.
        tensors = {name: t for name, t in tensors.items() if name in stored or not name.startswith("rng.")}
        for name, tensor in tensors.items():
            size = tuple(getattr(stored.get(name), "size", ()))
            if name not in stored or size != tuple(tensor.shape):
                found = f"shape {list(size)}" if name in stored else "nothing"
                raise UserError(
                    f"{folder}: {name}: the job wants shape {list(tensor.shape)}, the checkpoint has {found}; "
                    "resume with the model and optimizer settings of the run that saved it"
                )
        with _without_single_process_warning():
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
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
