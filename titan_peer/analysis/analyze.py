"""What a model consists of and what a token costs, without building the model.

Parameters and FLOPs by layer and component, bytes of weights that decoding one token reads, the latent cache beside the
caches of other kinds of attention, and the memory per process for the configured parallelism. `tables.py` and
`plots.py` show it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from titan_peer.analysis.estimate import MemoryEstimate, estimate_memory
from titan_peer.analysis.model_size import COMPONENTS, ComponentSize, ModelSize, model_size
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.resolve import resolve_vocabulary
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.experts.measure import batches, measure, read_documents, say_if_short
from titan_peer.experts.usage import LayerUsage
from titan_peer.inference.latent_cache import cache_bytes_per_token
from titan_peer.model import ModelArgs, Transformer

BYTES_PER_NUMBER = 2
"""Of weights and caches in decoding, which are bfloat16."""


@dataclass(frozen=True)
class Analysis:
    """Everything that `titan-peer analyze` shows."""

    job: str
    seq_len: int
    size: ModelSize
    kv_cache: dict[str, int]
    """Bytes per token, all layers together, by kind of attention."""
    memory: MemoryEstimate
    usage: list[LayerUsage]
    """Usage of a checkpoint's PEER layers on text; empty when no checkpoint is given."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that decoding a single token reads."""
        return BYTES_PER_NUMBER * self.size.active_parameters

    def by_component(self) -> dict[str, ComponentSize]:
        """Sums over the layers."""
        return _sums(self.size, lambda part: part.component, COMPONENTS)

    def by_layer(self) -> dict[str, ComponentSize]:
        """Sums over the components of a block."""
        layers = sorted({part.layer for part in self.size.components if part.layer is not None})
        names = ["outside of blocks", *(f"block {layer}" for layer in layers)]
        return _sums(self.size, lambda part: names[0] if part.layer is None else f"block {part.layer}", names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes and counts as whole numbers."""
        size = self.size
        return {
            "job": self.job,
            "seq_len": self.seq_len,
            "total_parameters": size.total_parameters,
            "active_parameters": size.active_parameters,
            "active_ratio": size.active_parameters / size.total_parameters,
            "forward_flops_per_token": size.forward_flops,
            "training_flops_per_token": size.training_flops,
            "weight_bytes_read_per_token": self.weight_bytes,
            "kv_cache_bytes_per_token": self.kv_cache,
            "memory_bytes_per_process": {**self.memory.rows(), "total": self.memory.total},
            "world_size": self.memory.world_size,
            "expert_usage": [usage.scalars() for usage in self.usage],
            "components": [asdict(part) for part in size.components],
        }


def _sums(size: ModelSize, key: Any, names: Sequence[str]) -> dict[str, ComponentSize]:
    groups: dict[str, list[ComponentSize]] = defaultdict(list)
    for part in size.components:
        groups[key(part)].append(part)
    return {
        name: ComponentSize(
            None,
            name,
            sum(part.total_parameters for part in groups[name]),
            sum(part.active_parameters for part in groups[name]),
            sum(part.forward_flops for part in groups[name]),
            sum(part.backward_flops for part in groups[name]),
        )
        for name in names
        if name in groups
    }


def kv_cache_bytes(args: ModelArgs) -> dict[str, int]:
    """Bytes per token that decoding keeps, all layers together (DeepSeek-V2, arXiv 2405.04434, table 1).

    The other kinds have as many heads with the same dims: keys of qk_nope_head_dim + qk_rope_head_dim and values of
    v_head_dim for every head (MHA), for every fourth head (GQA), for one head (MQA).
    """
    mla = args.mla
    head = mla.qk_head_dim + mla.v_head_dim
    groups = -(-mla.n_heads // 4)
    latent = cache_bytes_per_token(args, torch.bfloat16)
    numbers = {
        f"MHA ({mla.n_heads} heads)": mla.n_heads * head,
        f"GQA ({groups} group{'s' * (groups > 1)})": groups * head,
        "MQA": head,
    }
    others = {name: BYTES_PER_NUMBER * args.n_layers * count for name, count in numbers.items()}
    return {"MLA (latent and rotary key)": latent, **others}


def checkpoint_usage(config: JobConfig, checkpoint: Path, num_tokens: int, given: str) -> list[LayerUsage]:
    """Which experts a checkpoint of the job uses on the first `num_tokens` tokens of the job's held-out text (of its
    training text if it has none).

    Args:
        checkpoint: a folder step-N.
        given: how the user named it, for messages.
    Raises:
        UserError: the checkpoint cannot be read, or is not of this job's model.
    """
    model, job, tokenizer = load_model_for_inference(checkpoint)
    ours, theirs = asdict(config.model), asdict(job.model)
    for key in ours:
        if key not in ("vocab_size", "tokenizer_path") and ours[key] != theirs[key]:
            raise UserError(f"--checkpoint {given}: its model.{key} = {theirs[key]}, but the job's is {ours[key]}")
    paths = [source.path for source in config.validation.sources or config.data.sources]
    work = batches(read_documents(paths, tokenizer), config.training.seq_len, 8, num_tokens)
    say_if_short(work, num_tokens)
    return measure(model, work)


def analyze(config: JobConfig, world_size: int, usage: Sequence[LayerUsage] = ()) -> Analysis:
    """Analyse a job on the meta device.

    Raises:
        UserError: the job is invalid for this number of processes.
    """
    if config.model.vocab_size == 0:
        resolve_vocabulary(config.model, load_tokenizer(config.model.tokenizer_path).vocab_size)
    with torch.device("meta"):
        model = Transformer(config.model)
    size = model_size(model, config.training.seq_len)
    memory = estimate_memory(config, world_size)
    name = config.job.description or Path(config.job.config_file).stem or "default job"
    return Analysis(name, config.training.seq_len, size, kv_cache_bytes(config.model), memory, list(usage))
