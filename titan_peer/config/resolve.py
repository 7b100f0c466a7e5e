"""Keys of a job that follow from other things: the vocabulary from the tokenizer, the batch from the processes."""

from __future__ import annotations

from titan_peer.common.errors import UserError
from titan_peer.config.job import Model, Training


def resolve_vocabulary(model: Model, known: int) -> None:
    """Fill in model.vocab_size = 0 with the bound of the tokenizer's ids, `known`.

    Raises:
        UserError: the tokenizer has ids that the key leaves no room for.
    """
    if model.vocab_size == 0:
        model.vocab_size = known
    elif model.vocab_size < known:
        raise UserError(
            f"model.vocab_size = {model.vocab_size}: the tokenizer {model.tokenizer_path} has ids up to {known - 1}; "
            f"give at least {known}, or 0 to take the tokenizer's"
        )


def resolve_batch(training: Training, world_size: int) -> int:
    """Fill in training.global_batch_size = -1; returns the micro-batches a process has in a step.

    Raises:
        UserError: the global batch does not divide into micro-batches of `world_size` processes.
    """
    sequences = training.local_batch_size * world_size
    if training.global_batch_size == -1:
        training.global_batch_size = sequences
    if training.global_batch_size % sequences:
        raise UserError(
            f"training.global_batch_size = {training.global_batch_size}: must be a multiple of "
            f"training.local_batch_size x data-parallel degree = {training.local_batch_size} x "
            f"{world_size} = {sequences}"
        )
    return training.global_batch_size // sequences
