"""Hand-written computation: product-key retrieval, the expert operator, row-wise table updates.

Each public function has three forms: a plain PyTorch reference (`reference.py`, the specification), a CPU path (`cpu/`,
C++) and a GPU path (`triton/`). `backends.py` chooses the path for each device, and `backend_report` names it in one
line.
"""

from titan_peer.ops.backends import backend_report
from titan_peer.ops.missed_steps import MissedSteps
from titan_peer.ops.peer_experts import peer_experts
from titan_peer.ops.product_keys import product_key_retrieve, product_key_topk
from titan_peer.ops.row_gradients import TABLES, RowGradients, rowwise_adamw_, rowwise_normalized_
from titan_peer.ops.settings import set_table_gradient

__all__ = [
    "TABLES",
    "MissedSteps",
    "RowGradients",
    "backend_report",
    "peer_experts",
    "product_key_retrieve",
    "product_key_topk",
    "rowwise_adamw_",
    "rowwise_normalized_",
    "set_table_gradient",
]
