"""titan_peer: train language models built of PEER (millions of tiny experts) and multi-head latent attention.

The parts for other people's models are here; they are imported when they are first asked for, since PyTorch takes
seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_peer.model import MLA, PEER, Transformer
    from titan_peer.model_args import MLAArgs, ModelArgs, PEERArgs
    from titan_peer.ops import peer_experts, product_key_retrieve, product_key_topk
    from titan_peer.optim.rowwise import RowwiseAdamW

__version__ = "0.1.0"

__all__ = [
    "MLA",
    "PEER",
    "MLAArgs",
    "ModelArgs",
    "PEERArgs",
    "RowwiseAdamW",
    "Transformer",
    "__version__",
    "peer_experts",
    "product_key_retrieve",
    "product_key_topk",
]

_MODULES = {
    "titan_peer.model": ("MLA", "PEER", "Transformer"),
    "titan_peer.model_args": ("MLAArgs", "ModelArgs", "PEERArgs"),
    "titan_peer.ops": ("peer_experts", "product_key_retrieve", "product_key_topk"),
    "titan_peer.optim.rowwise": ("RowwiseAdamW",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
