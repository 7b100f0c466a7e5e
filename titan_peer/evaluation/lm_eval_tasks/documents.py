"""The documents of the task files in this folder, wherever the package is installed.

Loading a task file by its path also registers the model class "titan_peer" with lm_eval, so that the plain `lm_eval`
command can use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.registry import model_registry

if "titan_peer" not in model_registry:
    model_registry.register("titan_peer", target="titan_peer.evaluation.lm_evaluation_harness:TitanPeerLM")


def load(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of a JSON-lines file in this folder, as the split "test"."""
    with (Path(__file__).parent / file).open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def text_metrics(doc: dict[str, Any], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """A text's log-likelihood, with the numbers of words and bytes to divide it by."""
    (log_likelihood,) = results
    num_words, num_bytes = len(doc["text"].split()), len(doc["text"].encode())
    return {
        "word_perplexity": (log_likelihood, num_words),
        "byte_perplexity": (log_likelihood, num_bytes),
        "bits_per_byte": (log_likelihood, num_bytes),
    }
