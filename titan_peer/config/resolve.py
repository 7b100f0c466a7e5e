"""Keys of a job that depend on other things: the vocabulary on the tokenizer, the batch on the data-parallel degree."""

from __future__ import annotations

from titan_peer.common.errors import UserError
from titan_peer.config.job import Model, Training


def resolve_vocabulary(model: Model, known: int) -> None:
    """Replace model.vocab_size = 0 by the number of the tokenizer's ids, `known`.

    Raises:
        UserError: model.vocab_size is too small for the tokenizer's ids.
    """
    if model.vocab_size == 0:
        model.vocab_size = known
    elif model.vocab_size < known:
        raise UserError(
            f"model.vocab_size = {model.vocab_size}: the tokenizer {model.tokenizer_path} has ids up to {known - 1}; "
            f"give at least {known}, or 0 to take the tokenizer's"
        )


def resolve_batch(training: Training, dp_degree: int) -> int:
    """Replace training.global_batch_size = -1 by its value; returns the number of micro-batches per process and step.

    Raises:
        UserError: the global batch cannot be divided into micro-batches of `dp_degree` processes.
    """
    sequences = training.local_batch_size * dp_degree
    if training.global_batch_size == -1:
        training.global_batch_size = sequences
    if training.global_batch_size % sequences:
        raise UserError(
            f"training.global_batch_size = {training.global_batch_size}: must be a multiple of "
            f"training.local_batch_size x data-parallel degree = {training.local_batch_size} x "
            f"{dp_degree} = {sequences}"
        )
    return training.global_batch_size // sequences
