"""What a job prints before its first step (which model it trains, on what, and how), and why it ends before its last."""

from __future__ import annotations

import torch

from titan_peer import __version__
from titan_peer.analysis.model_size import ModelSize
from titan_peer.common.units import bytes_text
from titan_peer.config.job import JobConfig
from titan_peer.data.special_tokens import describe
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.distributed.collectives import local
from titan_peer.metrics.callback import Run
from titan_peer.ops import backend_report
from titan_peer.ops.attention import attention_backend
from titan_peer.optim.schedule import schedule_phases


def banner(run: Run, size: ModelSize, tokenizer: Tokenizer, dtype: torch.dtype) -> str:
    """The lines of the banner.

    Args:
        dtype: in which matrices are multiplied.
    """
    config, training, world = run.config, run.config.training, run.world
    mla, device = config.model.mla, world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    micro_batches = training.global_batch_size // (training.local_batch_size * world.dp_degree)
    batch = (
        f"{training.global_batch_size} x {training.seq_len} tokens per step ({micro_batches} micro-batches per process)"
    )
    n_peer = len(config.model.layers_of("peer"))
    lines = [
        f"titan_peer {__version__}, torch {torch.__version__}: {config.job.description or config.job.config_file}",
        f"model      {size.total_parameters:,} parameters, {size.active_parameters:,} active per token; "
        f"{config.model.n_layers} blocks, {n_peer} with PEER of {config.model.peer.num_experts:,} experts",
        f"tokenizer  {config.model.tokenizer_path}: {describe(tokenizer.specials, config.data)}",
        f"device     {world.size} x {name}, compute {str(dtype).removeprefix('torch.')}, "
        f"compile {'on' if config.compile.enable else 'off'}",
        f"attention  {attention_backend(device, mla.qk_head_dim, mla.v_head_dim, dtype.itemsize)}",
        f"experts    {backend_report(device)}; {config.optimizer.expert_update} update",
        f"batch      {batch}, {_steps(run)}",
        f"rate       {_rate(config)}",
        f"memory     {_memory(run)}",
        f"output     {run.dump_folder}",
    ]
    return "\n".join(lines)


def _steps(run: Run) -> str:
    steps, done = run.config.training.steps, run.resumed_step
    return f"steps {done + 1} to {steps}" if done < steps else f"all {steps} steps done"


def _rate(config: JobConfig) -> str:
    warmup, constant, decay = schedule_phases(config.training.steps, config.lr_scheduler)
    shape = config.lr_scheduler.decay_type
    return f"{config.optimizer.lr:g}; steps: {warmup} warm-up, {constant} constant, {decay} {shape} decay"


def _memory(run: Run) -> str:
    parameters = sum(local(p).nbytes for p in run.model.parameters())
    moments = sum(local(t).nbytes for _, t in run.optimizers.named_state())
    average = run.optimizers.average
    averaged = "" if average is None else f", averaged weights {bytes_text(average.nbytes)}"
    return (
        f"parameters {bytes_text(parameters)}, moments {bytes_text(moments)}{averaged} per process; "
        "titan-peer estimate says what a step takes"
    )


def nothing_to_do(step: int, steps: int) -> str:
    """What a job says whose checkpoint is of its last step."""
    return (
        f"nothing to do: the checkpoint is of step {step}, and training.steps = {steps}; more steps go on from there, "
        "--checkpoint.load_step 0 starts anew"
    )


def stopped(step: int, steps: int, *, saves: bool) -> str:
    """What a job says that a signal has stopped."""
    return f"stopped at step {step} of {steps}" + ("; the same command resumes from here" if saves else "")
