"""nanochat's own model and optimizer on the batches of one of our jobs: a part of recipe.py, which says how to start it.

    python benchmarks/recipe_nanochat.py CLONE SCALE --job.config_file ... (keys of the job)

The model has nanochat's shape for the job's dim and layers (heads of 128, four times the dim in its feed-forward), its optimizer
nanochat's schedules, and all of its learning rates are multiplied by SCALE. Its attention crosses document borders; labels
are ours, so that both are measured on the same tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_peer.common.command_line import FlagParser
from titan_peer.config.parse import load_config
from titan_peer.config.resolve import resolve_batch, resolve_vocabulary
from titan_peer.data.of_job import training_loader, validation_loader
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.distributed.world import init_world
from titan_peer.metrics.held_out_loss import HeldOutLoss, held_out_loss

IGNORED = -1  # nanochat's label of a token that is not learnt; ours is -100


def learning_rate_factor(step: int, steps: int, warmup: int, warmdown: int) -> float:
    """nanochat's schedule: linear warm-up, constant, linear warm-down to 0.05; steps count from 0."""
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * 0.05


def momentum(step: int, steps: int, warmdown: int) -> float:
    """nanochat's schedule of Muon's momentum: 0.85 to 0.97 over 400 steps, to 0.90 during the warm-down."""
    if step < 400:
        return 0.85 + 0.12 * step / 400
    into = max(step - (steps - warmdown), 0) / warmdown
    return 0.97 - 0.07 * into


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    return torch.where(batch["labels"] < 0, IGNORED, batch["labels"])


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("clone", type=Path, help="folder of nanochat")
    parser.add_argument("scale", type=float, help="factor on its learning rates")
    options, arguments = parser.parse_known_args()
    config = load_config(arguments)
    world = init_world(config.parallelism)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    resolve_vocabulary(config.model, tokenizer.vocab_size)
    resolve_batch(config.training, world.dp_degree)
    loader = training_loader(config, tokenizer, world)
    held_out = validation_loader(config, tokenizer, world)

    os.environ["NANOCHAT_DTYPE"] = "bfloat16"
    sys.path.insert(0, str(options.clone.resolve()))
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(config.debug.seed)
    heads = max(config.model.dim // 128, 1)
    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                sequence_len=config.training.seq_len,
                vocab_size=config.model.vocab_size,
                n_layer=config.model.n_layers,
                n_head=heads,
                n_kv_head=heads,
                n_embd=config.model.dim,
                window_pattern="L",
            )
        )
    model.to_empty(device="cpu")
    model.init_weights()
    scale = options.scale
    print(f"{model.estimate_flops() / 1e6:.1f} MFLOPs per token in training", flush=True)
    optimizer = model.setup_optimizer(
        unembedding_lr=0.004 * scale, embedding_lr=0.2 * scale, scalar_lr=0.5 * scale, matrix_lr=0.02 * scale
    )
    run(model, optimizer, iter(loader), held_out, config)


def run(model: Any, optimizer: Any, batches: Any, held_out: Any, config: Any) -> None:
    compiled = torch.compile(model, dynamic=False)
    steps, tokens = config.training.steps, config.training.global_batch_size * config.training.seq_len
    warmup, warmdown = config.lr_scheduler.warmup_steps, round(config.lr_scheduler.decay_ratio * steps)
    seconds = 0.0
    with (Path(config.job.dump_folder) / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps):
            start = time.perf_counter()
            batch = next(batches)
            loss = compiled(batch["tokens"], labels_of(batch))
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, steps, warmup, warmdown)
                if group["kind"] == "muon":
                    group["momentum"] = momentum(step, steps, warmdown)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            seconds += time.perf_counter() - start
            record = {
                "step": step + 1,
                "loss": loss.item(),
                "tokens_seen": (step + 1) * tokens,
                "elapsed_seconds": seconds,
            }
            if (step + 1) % config.validation.freq == 0 or step + 1 == steps:
                file.write(json.dumps(record) + "\n")
                found = validate(model, held_out, config.validation.steps)
                file.write(json.dumps({"step": step + 1, **found.record("validation_")}) + "\n")
                file.flush()


def validate(model: Any, held_out: Any, most: int) -> HeldOutLoss:
    """The loss over all held-out sets, as a job of ours measures it."""

    def summed(batch: dict[str, Tensor]) -> Tensor:
        return model(batch["tokens"], labels_of(batch), loss_reduction="sum")  # type: ignore[no-any-return]

    model.eval()
    found = []
    for batches in held_out.sets.values():
        batches.read_ahead(most)
        found.append(held_out_loss(summed, batches, max_batches=most))
    model.train()
    return HeldOutLoss.over(found)


if __name__ == "__main__":
    main()
