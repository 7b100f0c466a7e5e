"""The learning rate over a job: warm-up, stable, decay."""

from __future__ import annotations

import math

from titan_peer.config.optimizer import LRScheduler


def schedule_phases(total_steps: int, config: LRScheduler) -> tuple[int, int, int]:
    """The numbers of steps of warm-up, at the peak rate, and of decay that fit into `total_steps`.

    A schedule that is too long is cut, the decay first. A job of one step has no decay, whose rate would
    be the last one.
    """
    warmup = min(config.warmup_steps, total_steps)
    decay = min(round(config.decay_ratio * total_steps), total_steps - warmup)
    if decay == total_steps == 1:
        decay = 0
    return warmup, total_steps - warmup - decay, decay


def schedule_cuts(total_steps: int, config: LRScheduler) -> list[str]:
    """One sentence for each part of the schedule that does not fit into `total_steps` and is cut."""
    warmup, _, decay = schedule_phases(total_steps, config)
    asked = round(config.decay_ratio * total_steps)
    found = []
    if warmup < config.warmup_steps:
        found.append(
            f"lr_scheduler.warmup_steps = {config.warmup_steps} is more than training.steps = {total_steps}: "
            f"the warm-up takes all {total_steps} steps, and the rate never decays"
        )
    elif decay < asked and total_steps > 1:
        found.append(
            f"lr_scheduler.warmup_steps = {config.warmup_steps} leaves {decay} of training.steps = {total_steps} to the decay, "
            f"for which lr_scheduler.decay_ratio = {config.decay_ratio} asks {asked}"
        )
    return found


def learning_rate_factor(step: int, total_steps: int, config: LRScheduler) -> float:
    """Warmup-stable-decay: the factor on the peak rate for `step` (the first step is 1).

    Linear warmup over `warmup_steps`, then 1, then a decay over the last `decay_ratio * total_steps` steps that reaches
    `min_lr_factor` at the last one: linear, cosine, or sqrt (1 - sqrt of the share done). `schedule_phases` says what
    happens if these do not fit.
    """
    warmup_steps, _, decay_steps = schedule_phases(total_steps, config)
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - (total_steps - decay_steps)) / decay_steps if decay_steps else 0.0
    if done <= 0:
        return 1.0
    done = min(done, 1.0)
    if config.decay_type == "linear":
        left = 1 - done
    elif config.decay_type == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - math.sqrt(done)
    return config.min_lr_factor + (1 - config.min_lr_factor) * left
