"""Make jobs comparable: one number of a job is changed until its parameters or FLOPs equal those of the base job."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig

Equal = Literal["none", "total_parameters", "active_parameters", "flops"]
TOLERANCE = 0.02
"""The largest relative difference from the base job in the quantity that is to be equal."""


@dataclass(frozen=True)
class Cost:
    """What a job costs."""

    total_parameters: int
    active_parameters: int
    flops_per_token: int
    """In training: forward and backward."""
    tokens: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole run."""
        return self.flops_per_token * self.tokens


def tokens_per_step(config: JobConfig, processes: int) -> int:
    training = config.training
    sequences = training.global_batch_size
    if sequences == -1:
        sequences = training.local_batch_size * processes
    return sequences * training.seq_len


def cost(config: JobConfig, processes: int) -> Cost:
    """What the job costs, counted on the meta device; nothing is allocated."""
    # here, so that a mistake in the job or in an axis is answered without waiting for torch
    import torch

    from titan_peer.analysis.model_size import model_size
    from titan_peer.data.tokenizer import load_tokenizer
    from titan_peer.model import Transformer

    args = config.model
    if args.vocab_size == 0:
        args = dataclasses.replace(args, vocab_size=load_tokenizer(args.tokenizer_path).vocab_size)
    with torch.device("meta"):
        size = model_size(Transformer(args), config.training.seq_len)
    tokens = config.training.steps * tokens_per_step(config, processes)
    return Cost(size.total_parameters, size.active_parameters, size.training_flops, tokens)


def nearest_shape(num_experts: int, axes: int) -> list[int]:
    """Numbers of sub-keys per axis, as equal as possible, with a product near num_experts."""
    sizes: list[int] = []
    left = float(num_experts)
    for axis in range(axes, 0, -1):
        sizes.append(max(round(left ** (1 / axis)), 1))
        left /= sizes[-1]
    return sorted(sizes, reverse=True)


def set_expert_count(config: JobConfig, number: int) -> None:
    peer = config.model.peer
    peer.product_key_dim = nearest_shape(number, len(peer.product_key_dim))
    peer.num_experts = math.prod(peer.product_key_dim)


def set_steps(config: JobConfig, steps: int) -> None:
    """Change the length of the run; warmup keeps its share of the steps."""
    warmup_share = config.lr_scheduler.warmup_steps / config.training.steps
    config.training.steps = max(steps, 1)
    config.lr_scheduler.warmup_steps = round(warmup_share * config.training.steps)


@dataclass(frozen=True)
class FreeNumber:
    """A number of the job that the solver may change."""

    get: Callable[[JobConfig], int]
    set: Callable[[JobConfig, int], None]
    changes: frozenset[str]
    """The config keys it changes; an axis over one of them cannot have it as its free number."""


def _model_number(section: str, name: str) -> FreeNumber:
    def holder(config: JobConfig) -> object:
        return getattr(config.model, section) if section else config.model

    key = ".".join(part for part in ("model", section, name) if part)
    return FreeNumber(
        lambda config: getattr(holder(config), name),
        lambda config, number: setattr(holder(config), name, number),
        frozenset({key}),
    )


FREE_NUMBERS: dict[str, FreeNumber] = {
    "tokens": FreeNumber(lambda c: c.training.steps, set_steps, frozenset({"training.steps"})),
    "expert_count": FreeNumber(
        lambda c: c.model.peer.num_experts,
        set_expert_count,
        frozenset({"model.peer.num_experts", "model.peer.product_key_dim"}),
    ),
    "experts_per_token": _model_number("peer", "num_experts_per_tok"),
    "expert_size": _model_number("peer", "expert_hidden_size"),
    "ffn_hidden_dim": _model_number("", "ffn_hidden_dim"),
    "kv_lora_rank": _model_number("mla", "kv_lora_rank"),
    "v_head_dim": _model_number("mla", "v_head_dim"),
}
"""By their names for --free."""

# The order in which numbers are tried for a quantity: first those with the finest steps that change the design the
# least.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "flops": ("tokens",),
    "total_parameters": ("expert_count", "ffn_hidden_dim", "v_head_dim"),
    "active_parameters": ("ffn_hidden_dim", "experts_per_token", "v_head_dim"),
}


def solve(
    config: JobConfig, target: Cost, equal: Equal, changed: frozenset[str], processes: int, free: str | None = None
) -> JobConfig:
    """The job with one free number set so that it costs as much as `target`.

    Args:
        changed: the config keys in which this job differs from the base job; they are not free.
        free: the name of the number; None: the suitable ones are tried in order.
    Raises:
        UserError: no value of any free number comes within TOLERANCE.
    """
    if equal == "none":
        return config
    wanted = getattr(target, equal)

    def miss(candidate: JobConfig) -> float:
        return abs(getattr(cost(candidate, processes), equal) / wanted - 1)

    names = [free] if free is not None else list(_PREFERRED[equal])
    tried = []
    for name in names:
        number = FREE_NUMBERS[name]
        if number.changes & changed or (name == "ffn_hidden_dim" and not _has_dense_blocks(config)):
            continue
        candidate = _nearest(config, number, equal, wanted, processes)
        if miss(candidate) <= TOLERANCE:
            return candidate
        tried.append(f"{name} = {number.get(candidate):,} is {miss(candidate):.1%} off")
    raise UserError(
        f"--equal {equal}: {wanted:,} cannot be reached within {TOLERANCE:.0%}: {'; '.join(tried) or 'nothing is free'}. "
        f"Choose another --free ({', '.join(FREE_NUMBERS)})" + (" or more --tokens" if equal == "flops" else "")
    )


def _has_dense_blocks(config: JobConfig) -> bool:
    return config.model.has("feed_forward")


def _nearest(config: JobConfig, number: FreeNumber, equal: Equal, wanted: int, processes: int) -> JobConfig:
    """The job whose quantity, which grows with the free number, is nearest to the wanted value."""

    def at(value: int) -> tuple[JobConfig, int]:
        candidate = copy.deepcopy(config)
        number.set(candidate, value)
        return candidate, getattr(cost(candidate, processes), equal)

    low, high = 1, max(number.get(config), 1)
    while at(high)[1] < wanted and high < 2**40:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if at(middle)[1] < wanted:
            low = middle
        else:
            high = middle
    return min((at(low), at(high)), key=lambda found: abs(found[1] - wanted))[0]
