"""The loaders of a training job on this process."""

from __future__ import annotations

from titan_peer.config.job import JobConfig
from titan_peer.data.loader import TrainingLoader, ValidationLoader, build_dataloader, build_validation_dataloader
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.distributed.world import World


def training_loader(config: JobConfig, tokenizer: Tokenizer, world: World) -> TrainingLoader:
    """The endless training batches of this process.

    Raises:
        UserError: a source cannot be read.
    """
    training = config.training
    return build_dataloader(
        data=config.data,
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.local_batch_size,
        dp_rank=world.dp_rank,
        dp_world_size=world.dp_degree,
        seed=config.debug.seed,
        pin_memory=world.device.type == "cuda",
    )


def validation_loader(config: JobConfig, tokenizer: Tokenizer, world: World) -> ValidationLoader:
    """This process's share of the held-out sets.

    Raises:
        UserError: a source cannot be read.
    """
    return build_validation_dataloader(
        sources=config.validation.sources,
        tokenizer=tokenizer,
        seq_len=config.training.seq_len,
        local_batch_size=config.validation.local_batch_size,
        dp_rank=world.dp_rank,
        dp_world_size=world.dp_degree,
        data=config.data,
    )
