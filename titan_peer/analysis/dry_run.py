"""A training step without devices, data, weights or other processes: what it would take in memory and communication.

The real plans, model, optimizers and collectives run on fake tensors, which have shapes but no memory, as rank 0 of a
fake process group. `./run_train.sh ... --comm.mode fake_backend` prints the result, so that a cluster job can be
checked before it is queued.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_peer.analysis.tensor_ledger import Collective, TensorLedger, Traffic
from titan_peer.common.units import bytes_text
from titan_peer.config.job import JobConfig
from titan_peer.config.resolve import resolve_batch, resolve_vocabulary
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.distributed.parallelize import compute_dtype, parallelize
from titan_peer.distributed.world import World, init_world
from titan_peer.experts.usage import ExpertUsage
from titan_peer.model import PEERArgs, Transformer
from titan_peer.ops import cross_entropy
from titan_peer.optim.optimizers import Optimizers
from titan_peer.train_step import GlobalBatch, Stage, TrainStep

KINDS = (
    "parameters",
    "moments",
    "averaged weights",
    "expert usage",
    "gradients",
    "row-gradient factors",
    "activations",
    "loss chunk",
    "communication buffers",
    "update workspace",
)


@dataclass(frozen=True)
class StepTrace:
    """One training step of one process."""

    memory: dict[str, int]
    """Bytes by kind (KINDS) at the peak."""
    traffic: dict[tuple[str, Collective], Traffic]
    """What is sent per step, by (mesh dimension, collective)."""
    micro_batches: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


@contextmanager
def fake_world(config: JobConfig, world_size: int) -> Iterator[World]:
    """Rank 0 of `world_size` processes that do not exist, on the CPU whatever the machine has, since shapes are the
    same.

    Raises:
        UserError: the job's parallel degrees do not fit that number.
    """
    if world_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield init_world(config.parallelism, torch.device("cpu"))
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def resolve(config: JobConfig, dp_degree: int) -> int:
    """Fill in what follows from the tokenizer and the data-parallel degree; returns the micro-batches per step."""
    model = config.model
    # a job whose tokenizer does not exist yet can be traced if it gives the size of the vocabulary
    if model.vocab_size == 0 or model.tokenizer_path == "byte" or Path(model.tokenizer_path).exists():
        resolve_vocabulary(model, load_tokenizer(model.tokenizer_path).vocab_size)
    return resolve_batch(config.training, dp_degree)


def trace_step(config: JobConfig, world: World) -> StepTrace:
    """Run a step of the job on fake tensors.

    With compile.enable the blocks are traced and split into forward and backward as by the compiler, but no code is
    generated. How many of a token's experts an expert-parallel process holds is not known; a random spread is assumed.
    """
    micro_batches = resolve(config, world.dp_degree)
    config = _with_dtype_of_this_machine(config)
    with torch.device("meta"):
        model = Transformer(config.model)
    model.loss_chunk_size = config.training.loss_chunk_size
    parallelize(model, config, world)
    if config.compile.enable:
        for block in model.layers:
            block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    tokens = config.training.local_batch_size * config.training.seq_len
    places = _places_on_one_process(config.model.peer, world.ep_degree)
    ledger = TensorLedger(lambda number: 1.0 if number.is_floating_point() else places)
    with _stand_in_for_compiler(), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        with ledger.booked_as("parameters"):
            model.to_empty(device=world.device)
        with ledger.booked_as("expert usage"):
            usage = ExpertUsage(model) if config.metrics.log_expert_usage else None
        with ledger.booked_as("moments"):
            optimizers = Optimizers(model, config.optimizer, world.expert_mesh, tokens * micro_batches)
        with ledger.booked_as("averaged weights"):
            optimizers.average_weights(config.training.ema_decay)
        step = _booked_step(config, world, model, optimizers, ledger)
        for _ in range(2):  # the first step makes what is kept from step to step; the second one counts
            ledger.forget_peak()
            with ledger.booked_as("activations"):
                batch = _empty_batch(config, world, micro_batches)
            step(batch, config.optimizer.lr)
            del batch
        del usage
    dims = _mesh_dims(world)
    traffic = {(dims.get(c.group_name, "all"), c): t for c, t in ledger.traffic.items()}
    memory = {kind: ledger.peak[kind] for kind in KINDS}
    memory["activations"] += sum(size for kind, size in ledger.peak.items() if kind not in KINDS)
    return StepTrace(memory, traffic, micro_batches)


def _empty_batch(config: JobConfig, world: World, micro_batches: int) -> GlobalBatch:
    """A batch of the job's shape, all of its micro-batches the same one: the device holds one at a time."""
    training = config.training
    shape = (training.local_batch_size, training.seq_len)
    keys = ("tokens", "document_ids", "labels")
    micro_batch = {key: torch.zeros(shape, dtype=torch.int64, device=world.device) for key in keys}
    return GlobalBatch([micro_batch] * micro_batches, training.global_batch_size * training.seq_len)


def _with_dtype_of_this_machine(config: JobConfig) -> JobConfig:
    """The fake device is a CPU, but "auto" means the dtype of this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = compute_dtype(config.training.mixed_precision_param, device) == torch.bfloat16
    training = dataclasses.replace(config.training, mixed_precision_param="bfloat16" if bfloat16 else "float32")
    return dataclasses.replace(config, training=training)


@contextmanager
def _stand_in_for_compiler() -> Iterator[None]:
    """The compiler fuses all passes over a chunk's logits: what is left in memory is one product and its gradient. What
    was compiled inside is forgotten afterwards, so that real blocks are compiled for real."""

    def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.t()
        return torch.zeros((), device=hidden.device), torch.empty_like(logits)

    compiled = cross_entropy._compiled_loss_and_logit_gradient
    cross_entropy._compiled_loss_and_logit_gradient = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        cross_entropy._compiled_loss_and_logit_gradient = compiled
        torch._dynamo.reset()


def _places_on_one_process(peer: PEERArgs, parts: int) -> int:
    """The largest number of a token's heads x k places that fall on one of `parts` processes, over all tokens: five
    standard deviations above the mean of a binomial distribution."""
    places = peer.num_heads * peer.num_experts_per_tok
    mean = places / parts
    return min(places, math.ceil(mean + 5 * math.sqrt(mean * (1 - 1 / parts))))


def _mesh_dims(world: World) -> dict[str, str]:
    """Mesh dimension of each process group, by the group's name."""
    if world.mesh is None or world.expert_mesh is None:
        return {}
    names: dict[str, str] = {}
    for mesh in (world.mesh, world.expert_mesh):
        assert mesh.mesh_dim_names is not None
        names |= {mesh.get_group(dim).group_name: dim for dim in mesh.mesh_dim_names}
    return names


_KIND_OF_STAGE: dict[Stage, str] = {
    "forward": "activations",
    "backward": "activations",
    "exchange": "row-gradient factors",
    "update": "update workspace",
}


def _booked_step(
    config: JobConfig, world: World, model: Transformer, optimizers: Optimizers, ledger: TensorLedger
) -> TrainStep:
    """The job's training step, which books its memory by stage, the loss and the gradients separately."""

    def loss_begins(*_: Any) -> None:
        ledger.kind = "loss chunk"

    def gradient_is_there(parameter: Tensor) -> None:
        ledger.book([parameter.grad], "gradients")

    @contextmanager
    def booked(stage: Stage) -> Iterator[None]:
        with ledger.booked_as(_KIND_OF_STAGE[stage]):
            yield
        if stage == "backward":
            ledger.book((p.grad for p in model.parameters()), "gradients")
            for collector in optimizers.collectors:
                ledger.book(collector.factors(), "row-gradient factors")

    model.norm.register_forward_hook(loss_begins)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(gradient_is_there)
    return TrainStep(model, optimizers, world, config.training, stage=booked)


def report(config: JobConfig, world_size: int) -> str:
    """What a step of the job takes on each of `world_size` processes, as text.

    Raises:
        UserError: parallel degrees or batch do not fit the number of processes.
    """
    with fake_world(config, world_size) as world:
        trace = trace_step(config, world)
        meshes = "  ".join(
            f"{dim} {mesh.size(i)}"
            for mesh in (world.mesh, world.expert_mesh)
            if mesh is not None
            for i, dim in enumerate(mesh.mesh_dim_names or ())
        )
    training = config.training
    lines = [
        f"dry run of {config.job.config_file or 'the default job'}: rank 0 of {world_size}",
        f"meshes     {meshes or 'one process'}",
        f"batch      {training.global_batch_size} x {training.seq_len} tokens per step, {trace.micro_batches} micro-batches "
        f"of {training.local_batch_size} per process",
        "",
        "memory per process (tensors) at its peak",
        *_table(
            [(kind, bytes_text(size)) for kind, size in [*trace.memory.items(), ("total", trace.peak_bytes)] if size]
        ),
    ]
    if trace.traffic:
        header = ("mesh dimension", "processes", "collective", "calls", "payload", "sent")
        rows = [
            (dim, str(c.group_size), c.operation, str(t.calls), bytes_text(t.payload_bytes), bytes_text(t.sent_bytes))
            for (dim, c), t in sorted(trace.traffic.items(), key=lambda item: -item[1].sent_bytes)
        ]
        sent = sum(t.sent_bytes for t in trace.traffic.values())
        rows.append(("total", "", "", "", "", bytes_text(sent)))
        lines += ["", "communication per process and step", *_table([header, *rows])]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: text left, numbers (what starts with a digit) right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.rjust(w) if c[:1].isdigit() else c.ljust(w) for c, w in zip(row, widths)).rstrip()
        for row in rows
    ]
