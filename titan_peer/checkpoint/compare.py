"""Whether a checkpoint fits this job: its settings, its model, its tokenizer.

Weights are valid only for the model and the tokenizer that they were trained with. A difference there stops the job
unless checkpoint.allow_changed names it; every other difference is logged.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer, split_pattern
from titan_peer.model import ModelArgs

Changes = dict[str, tuple[Any, Any]]
"""Key -> (value in the checkpoint, value in the job)."""

TOKENIZER = "tokenizer"
"""The tokenizer's name in checkpoint.allow_changed."""

# Every other key of the model changes what the same weights compute.
_SEEN_IN_THE_TENSORS = {
    "model.vocab_size", "model.dim", "model.n_layers", "model.ffn_hidden_dim", "model.mla.q_lora_rank",
    "model.mla.kv_lora_rank", "model.peer.num_experts", "model.peer.product_key_dim", "model.peer.expert_hidden_size",
    "model.peer.keys_per_head", "model.peer.share_experts",
}  # fmt: skip
_NOT_OF_THE_FUNCTION = {"model.init_std", "model.max_seq_len", "model.peer.dropout", "model.tokenizer_path"}
_LAYOUT = {"model.n_dense_layers", "model.peer_every_n_layers", "model.peer_layers"}
_YARN = {
    f"model.mla.{name}"
    for name in ("original_seq_len", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Settings


def _flat(value: Any, key: str) -> dict[str, Any]:
    """{"data.sources[0].path": ..., "training.steps": ...} of nested dictionaries and lists of dictionaries."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}" if key else name).items()}
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return {k: v for i, part in enumerate(value) for k, v in _flat(part, f"{key}[{i}]").items()}
    return {key: value}


def changed_settings(saved: JobConfig, job: JobConfig) -> Changes:
    """Every key in which two jobs differ; a source that only one of them has differs in all its keys (None: absent)."""
    before, now = (_flat(dataclasses.asdict(j), "") for j in (saved, job))
    empty = {key for key, value in (before | now).items() if value == []}
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    return {n: (before.get(n), now.get(n)) for n in names if n not in empty or (n in before and n in now)}


def described(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes as text for a message."""
    return ", ".join(f"{key} = {_word(now)} (was {_word(was)})" for key, (was, now) in changes.items())


def _word(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def changed_function(saved: ModelArgs, model: ModelArgs) -> Changes:
    """The changed keys that make another model of the same tensors and that the tensors' names and shapes do not
    show."""
    before, now = (_flat(dataclasses.asdict(args), "model") for args in (saved, model))
    names = [n for n in now if n not in _SEEN_IN_THE_TENSORS | _NOT_OF_THE_FUNCTION | _LAYOUT]
    if saved.mla.rope_factor <= 1 and model.mla.rope_factor <= 1:
        names = [n for n in names if n not in _YARN]
    in_both = min(saved.n_layers, model.n_layers)
    layouts = [[layer for layer in args.layers_of("peer") if layer < in_both] for args in (saved, model)]
    if not any(layouts):
        names = [n for n in names if not n.startswith("model.peer.")]
    changes = {n: (before[n], now[n]) for n in names if before[n] != now[n]}
    if layouts[0] != layouts[1]:
        changes["model.peer_layers"] = (layouts[0], layouts[1])
    return changes


def model_keys() -> list[str]:
    """What checkpoint.allow_changed may name, besides TOKENIZER."""
    keys = _flat(dataclasses.asdict(ModelArgs()), "model")
    return [n for n in keys if n not in _SEEN_IN_THE_TENSORS | _NOT_OF_THE_FUNCTION]


def _allows(allowed: Sequence[str], key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)


def require_known_entries(allowed: Sequence[str]) -> None:
    """Raise UserError for an entry of checkpoint.allow_changed that matches no key."""
    known = [*model_keys(), TOKENIZER]
    for entry in allowed:
        if not any(fnmatch.fnmatchcase(key, entry) for key in known):
            raise UserError(f"checkpoint.allow_changed: {entry!r} matches nothing; allowed: {', '.join(known)}")


def require_same_function(checkpoint: Path, saved: ModelArgs, model: ModelArgs, allowed: Sequence[str]) -> None:
    """Raise UserError if the checkpoint's weights would compute another function in this model and no entry allows
    it."""
    changes = {k: v for k, v in changed_function(saved, model).items() if not _allows(allowed, k)}
    if changes:
        raise UserError(
            f"{checkpoint} was trained as another model: {described(changes)}; give the checkpoint's values, or, to use "
            f"its weights in this model all the same, --checkpoint.allow_changed {' '.join([*allowed, *changes])}"
        )


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer


def tokenizer_function(path: str) -> str:
    """A hash, equal for two tokenizers that turn every text into the same ids and every id into the same text.

    It is not a hash of the file: the layout of a tokenizer.json and its padding, truncation and post-processing have no
    effect on how it is used here.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(path)
    ends = [tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id]
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if path == "byte":
        content: Any = "byte"
    elif file.suffix == ".tiktoken":
        content = [hashlib.sha256(file.read_bytes()).hexdigest(), split_pattern(file.stem)]
    else:
        content = json.loads(tokenizers.Tokenizer.from_file(str(file)).to_str())
        for part in ("version", "truncation", "padding", "post_processor"):
            content.pop(part, None)
    return hashlib.sha256(json.dumps([content, *ends], sort_keys=True).encode()).hexdigest()


def require_same_tokenizer(checkpoint: Path, stored: str, job: str, allowed: Sequence[str]) -> None:
    """Raise UserError if the tokenizer at `job` maps differently from the one at `stored` and no entry allows it."""
    if _allows(allowed, TOKENIZER) or tokenizer_function(stored) == tokenizer_function(job):
        return
    theirs, ours = (_in_words(load_tokenizer(path)) for path in (stored, job))
    raise UserError(
        f"model.tokenizer_path = {job} ({ours}): is another tokenizer than {checkpoint} was trained with ({theirs}): the same "
        f"id means another text. Give that one, {stored}, or, to teach the model this one, --checkpoint.allow_changed tokenizer"
    )


def _in_words(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.vocab_size:,} entries, begin token {tokenizer.bos_id}, end token {tokenizer.eos_id}"
