"""The average of several checkpoints of a run, as a checkpoint of the model only.

Tensors are read one after another, so memory holds the result and one tensor more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from titan_peer.checkpoint.compare import changed_function, changed_settings, described, tokenizer_function
from titan_peer.checkpoint.files import (
    SafeReader,
    read_tensors,
    read_tokenizer_files,
    stored_shapes,
    stored_tokenizer_path,
)
from titan_peer.checkpoint.folder import AVERAGE, CONFIG, MODEL, TOKENIZER, TRAIN_STATE
from titan_peer.checkpoint.inference import require_sound_model
from titan_peer.checkpoint.saving import CheckpointSaveError, Ranks, write_checkpoint
from titan_peer.common.errors import UserError
from titan_peer.config.saved_job import read_saved_job
from titan_peer.model import Transformer


def merge_checkpoints(checkpoints: Sequence[Path], output: Path, *, dtype: str = "float32", ema: bool = False) -> Path:
    """Write `output/step-N`, N the step of the last of the checkpoints, whole or not at all; returns it.

    Its weights and running statistics are the means over the checkpoints, summed in float32. Job, tokenizer and the
    numbers of the training are those of the last checkpoint.

    Args:
        checkpoints: folders step-N of one run, in the order of their steps.
        dtype: of the parameters; running statistics are float32.
        ema: average the moving averages of the weights (training.ema_decay) in place of them.
    Raises:
        UserError: a checkpoint is damaged, is of another model or tokenizer than the last one, or has no moving
            averages; or the output cannot be written.
    """
    last = checkpoints[-1]
    for checkpoint in checkpoints:
        require_sound_model(checkpoint, ema=ema)
        _require_same(checkpoint, last, AVERAGE if ema else MODEL)
    model = read_saved_job(last / CONFIG).model
    with torch.device("meta"):
        buffers = {name for name, _ in Transformer(model).named_buffers()}
    tokenizer = stored_tokenizer_path(last, model.tokenizer_path)
    state = json.loads((last / TRAIN_STATE).read_text(encoding="utf-8"))
    merged = [str(checkpoint) for checkpoint in checkpoints]
    kept = {"step": state["step"], "tokens_seen": state["tokens_seen"], "model_only": True, "merged": merged}
    documents = {f"{TOKENIZER}/{name}": content for name, content in read_tokenizer_files(tokenizer).items()}
    documents[CONFIG] = (last / CONFIG).read_bytes()
    documents[TRAIN_STATE] = json.dumps(kept, indent=1).encode()

    def means() -> dict[str, Tensor]:
        averaged = _means(checkpoints, AVERAGE if ema else MODEL)
        return {f"{MODEL}{n}": t if n in buffers else t.to(getattr(torch, dtype)) for n, t in averaged}

    try:
        output.mkdir(parents=True, exist_ok=True)
        return write_checkpoint(output, state["step"], means, documents, Ranks())
    except (OSError, CheckpointSaveError) as error:
        raise UserError(f"{output}: the merged checkpoint cannot be written: {error}") from None


def _require_same(checkpoint: Path, last: Path, prefix: str) -> None:
    """Raise UserError unless both checkpoints are of one model, and of tokenizers that map alike."""
    jobs = [read_saved_job(folder / CONFIG) for folder in (checkpoint, last)]
    stored = zip((checkpoint, last), jobs)
    paths = [stored_tokenizer_path(folder, job.model.tokenizer_path) for folder, job in stored]
    changes = changed_function(jobs[0].model, jobs[1].model)
    if _shapes(checkpoint, prefix) != _shapes(last, prefix):
        changes = {key: change for key, change in changed_settings(*jobs).items() if key.startswith("model.")}
        why = f"its tensors have other shapes; {described(changes)}"
    elif changes:
        why = described(changes)
    elif tokenizer_function(paths[0]) != tokenizer_function(paths[1]):
        why = "another tokenizer"
    else:
        return
    raise UserError(f"{checkpoint} cannot be averaged with {last}, which is of another model: {why}")


def _shapes(folder: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in stored_shapes(SafeReader(folder)).items() if name.startswith(prefix)}


def _means(checkpoints: Sequence[Path], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The mean of every tensor over the checkpoints, float32, by its name without the prefix."""
    for name, shape in _shapes(checkpoints[-1], prefix).items():
        total, part = torch.zeros(shape), torch.empty(shape)
        for checkpoint in checkpoints:
            read_tensors(checkpoint, {name: part}, no_dist=True)
            total += part
        yield name.removeprefix(prefix), total.div_(len(checkpoints))
