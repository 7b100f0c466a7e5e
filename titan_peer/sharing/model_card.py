"""The README of an exported model: what it is, how it was trained, and its measured results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from titan_peer import __version__
from titan_peer.analysis.model_size import model_size
from titan_peer.checkpoint.folder import TRAIN_STATE
from titan_peer.config.job import JobConfig
from titan_peer.model import Transformer

_SECTIONS = {"Evaluation": ("validation", "evaluation/"), "Expert usage": ("expert_usage/",)}


def model_card(checkpoint: Path, model: Transformer, job: JobConfig, table_dtype: str, license_name: str) -> str:
    """Markdown with Hugging Face's metadata header.

    Measurements come from the run's metrics.jsonl, if the checkpoint is still in its run's folder.

    Args:
        license_name: the weights' licence; "": none is named.
    """
    state = json.loads((checkpoint / TRAIN_STATE).read_text(encoding="utf-8"))
    size = model_size(model, job.training.seq_len)
    args, title = job.model, job.job.description or checkpoint.resolve().parent.parent.name
    n_peer = len(args.layers_of("peer"))
    training, optimizer = job.training, job.optimizer
    tables = {
        "float": "the same dtype as the other weights",
        "int8": "int8 with a scale per row",
        "float8_e4m3": "float8 with a scale per row",
    }
    facts = {
        "Parameters": f"{size.total_parameters:,}, of which {size.active_parameters:,} are used per token",
        "Blocks": f"{args.n_layers}, of which {n_peer} have {args.peer.num_experts:,} experts each (PEER)",
        "Attention": f"MLA, {args.mla.n_heads} heads, latent of {args.mla.kv_lora_rank} + {args.mla.qk_rope_head_dim}",
        "Context": f"{args.max_seq_len:,} tokens ({training.seq_len:,} in training)",
        "Vocabulary": f"{args.vocab_size:,}",
        "Expert tables": tables[table_dtype],
    }
    trained = {
        "Step": f"{state['step']:,} of {training.steps:,}",
        "Tokens": f"{state['tokens_seen']:,}",
        "Batch": f"{training.global_batch_size} x {training.seq_len} tokens",
        "Optimizer": f"{optimizer.name}, peak learning rate {optimizer.lr:g}, expert tables x {optimizer.group('expert_tables').lr_factor:g} "
        f"({optimizer.expert_update})",
        "Data": ", ".join(f"{source.name or source.path}" for source in job.data.sources),
    }
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [titan_peer, peer, mla]"]
    if license_name:
        header.append(f"license: {license_name}")
    metadata = "\n".join(["---", *header, "---"])
    parts = [
        f"{metadata}\n\n# {title}\n\nA language model with multi-head latent attention (MLA) and product-key retrieval of "
        f"tiny experts (PEER), trained with titan_peer {__version__}.",
        _bullets(facts),
        f"## Use\n\n```python\n{_USE}```\n\nTo continue its training, or to use faster kernels: `titan-peer import --input "
        "THIS_FOLDER --output NEW_RUN_FOLDER`.",
        f"## Training\n\n{_bullets(trained)}\n\nThe whole job is in `config.toml`.",
    ]
    latest = _latest_metrics(checkpoint.resolve().parent.parent / "metrics.jsonl", state["step"])
    for section, prefixes in _SECTIONS.items():
        values = {name: v for name, v in latest.items() if name.startswith(prefixes) and "/head_" not in name}
        if values:
            rows = [f"| {name} | {value[1]:.6g} | {value[0]:,} |" for name, value in values.items()]
            parts.append("\n".join([f"## {section}\n", "| metric | value | step |", "| --- | ---: | ---: |", *rows]))
    parts.append(
        "## Limits\n\nThe model continues text as it occurs in its training data. It has not been trained to follow "
        "instructions or to be safe, and what it writes need not be true."
    )
    return "\n\n".join(parts) + "\n"


_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
"""


def _bullets(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}**: {value}" for name, value in facts.items())


def _latest_metrics(path: Path, step: int) -> dict[str, tuple[int, float]]:
    """Name -> (step, value) of the newest record of each number, up to `step`."""
    latest: dict[str, tuple[int, float]] = {}
    if not path.is_file():
        return latest
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # an incomplete last line of a killed run
            continue
        if record["step"] <= step:
            latest |= {k: (record["step"], v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    return latest
