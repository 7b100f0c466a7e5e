"""Row-wise gradients of expert tables, kept as factors, and the row-wise AdamW step made from them.

The gradient of a table is a sum of outer products over the step's (token, expert) pairs: d down[n] = sum dz x_t^T and d
up[n] = sum hidden dy_t^T. Instead of gradient rows (as many numbers as the touched rows have weights) a step keeps the
factors: dz and hidden [T, K, E], x [T, D], dy [T, D_out]. Norm and update read them, row by row, through the pairs
sorted by expert. No gradient row is ever stored, and the amount that processes exchange grows with the tokens, not with
the experts.

If a step has so many tokens that their factors would take more memory than dense gradients of both tables, the factors
are added into dense gradients, from then on after each micro-batch.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from titan_peer.ops.backends import backend_for
from titan_peer.ops.checks import require_adamw_state, require_last_use, require_momentum, require_one_device
from titan_peer.ops.missed_steps import MissedSteps
from titan_peer.ops.sorted_pairs import SortedPairs

Table = Literal["down", "up"]
TABLES: tuple[Table, Table] = ("down", "up")
"""The two tables of a pair, in the order in which they are given everywhere."""

_numbers = itertools.count(1)
_collectors: weakref.WeakValueDictionary[int, RowGradients] = weakref.WeakValueDictionary()


class RowGradients:
    """The factored gradient of one pair of tables in one optimizer step: the collector of these tables.

    It is given to `peer_experts`, and every backward pass through that call records its factors here. Several `record`s
    before a `clear` (micro-batches, layers that share the tables) add up.

    The operator gets the collector's number as a tensor, `handle`. Compilers take a tensor as an input, so equal
    blocks, each with its own collector, share one compilation; a Python integer would become a constant of the compiled
    code. The collector knows the tables' shapes only, neither their memory nor their dtype: they may be moved.

    A copy (deepcopy, pickle) is another, empty collector.

    Args:
        expert_down: [N, E, D], whose shape alone is read.
        expert_up: [N, E, D_out], likewise.
    """

    def __init__(self, expert_down: Tensor, expert_up: Tensor) -> None:
        self.shapes = expert_down.shape, expert_up.shape
        # indices [T, K], dz [T, K, E], hidden [T, K, E], x [T, D], dy [T, D_out]: kept from step to step, since the
        # first touch of new memory costs more than the copy into it
        self._buffers: tuple[Tensor, ...] | None = None
        self._replacement: tuple[Tensor, ...] | None = None
        self._sorted: SortedPairs | None = None
        # float32 [N, E, D] and [N, E, D_out], and uint8 [N + 1], 1 for rows with a gradient (the last is for absent
        # places)
        self._dense: tuple[Tensor, Tensor, Tensor] | None = None
        self.num_tokens = 0
        number = next(_numbers)
        self.handle = torch.tensor(number, device="cpu")
        """0-d int64, always on the CPU, where reading it waits for no device."""
        _collectors[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGradients, tuple(torch.empty(shape, device="meta") for shape in self.shapes)

    @staticmethod
    def of(handle: Tensor) -> RowGradients:
        """The collector with this handle.

        Raises:
            RuntimeError: it no longer exists.
        """
        collector = RowGradients.find(handle)
        if collector is None:
            raise RuntimeError(
                "the RowGradients given to peer_experts no longer exists, so this backward pass cannot record the gradient "
                "of the expert tables; keep it until the backward pass is done, as titan_peer.model.Experts does"
            )
        return collector

    @staticmethod
    def find(handle: Tensor) -> RowGradients | None:
        """The collector with this handle; None if it no longer exists, or if a compiler traces with a stand-in of the
        handle, which has no value."""
        if isinstance(handle, FakeTensor):
            if handle.constant is None:
                return None
            handle = handle.constant  # in a dry run, where collectors are made from fake tensors
        return _collectors.get(int(handle))

    @property
    def is_empty(self) -> bool:
        return self.num_tokens == 0

    def record(self, indices: Tensor, dz: Tensor, hidden: Tensor, x: Tensor, dy: Tensor) -> None:
        """Add the factors of one backward pass (copied, or added into dense gradients)."""
        new = (indices, dz, hidden, x, dy)
        first, last = self.num_tokens, self.num_tokens + indices.shape[0]
        if self._dense is not None or last * _bytes_per_token(new) > self._dense_bytes:
            self._fold(new)
            return
        old = self._buffers
        if old is None or old[0].shape[0] < last or (old[3].dtype, old[3].device) != (x.dtype, x.device):
            grown = tuple(torch.empty(last, *f.shape[1:], dtype=f.dtype, device=f.device) for f in new)
            for kept, buffer in zip(old or (), grown):
                buffer[:first] = kept[:first]
            self._buffers = old = grown
        for factor, buffer in zip(new, old):
            buffer[first:last] = factor
        self.num_tokens = last
        self._sorted = None

    def clear(self) -> None:
        """Discard the step's gradient; the memory is kept for the next step."""
        self.num_tokens, self._replacement, self._sorted = 0, None, None
        for tensor in self._dense or ():
            tensor.zero_()

    def _fold(self, new: tuple[Tensor, ...]) -> None:
        """Add factors to dense gradients; the first time, add the stored factors too and free their buffers."""
        if self._dense is None:
            kept, self._buffers = self.factors(), None
            down, up = (torch.zeros(shape, dtype=torch.float32, device=new[0].device) for shape in self.shapes)
            is_used = torch.zeros(down.shape[0] + 1, dtype=torch.uint8, device=down.device)
            self._dense = (down, up, is_used)
            if kept and kept[0].shape[0]:
                self._add_to_dense(kept)
        self._add_to_dense(new)
        self.num_tokens += new[0].shape[0]
        self._sorted = None

    def _add_to_dense(self, factors: tuple[Tensor, ...]) -> None:
        assert self._dense is not None
        (down, up, is_used), (indices, dz, hidden, x, dy) = self._dense, factors
        backend, num_experts = backend_for(x, dz), down.shape[0]
        pairs = backend.sort_pairs(indices, num_experts)
        backend.table_gradient(pairs, dz, x, down, add=True)
        backend.table_gradient(pairs, hidden, dy, up, add=True)
        is_used.scatter_(0, torch.where(indices < 0, num_experts, indices).flatten(), 1)

    def take_dense(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Dense gradients of both tables and uint8 [N + 1], 1 for rows with a gradient, to be changed in place (for
        instance summed over processes); None if the gradient is kept as factors."""
        self._sorted = None
        return self._dense

    @property
    def _dense_bytes(self) -> int:
        return 4 * sum(shape.numel() for shape in self.shapes)

    def factors(self) -> tuple[Tensor, ...]:
        """indices [T, K], dz [T, K, E], hidden [T, K, E], x [T, D], dy [T, D_out] of all recorded tokens.

        Dense gradients are returned as factors too, without a copy: a row [E, D] becomes E tokens, each with one expert
        (-1, none, if the row has no gradient) and weight 1 in one hidden neuron.
        """
        if self._replacement is not None:
            return self._replacement
        if self._dense is not None:
            down, up, is_used = self._dense
            num_experts, E, _ = down.shape
            rows = torch.where(is_used[:-1].bool(), torch.arange(num_experts, device=down.device), -1)
            ones = torch.eye(E, device=down.device).repeat(num_experts, 1).unsqueeze(1)  # [N * E, 1, E]
            return rows.repeat_interleave(E).unsqueeze(1), ones, ones, down.flatten(0, 1), up.flatten(0, 1)
        if self._buffers is None:
            return ()
        return tuple(buffer[: self.num_tokens] for buffer in self._buffers)

    def replace(self, indices: Tensor, dz: Tensor, hidden: Tensor, x: Tensor, dy: Tensor) -> None:
        """Replace the factors, for instance by those of all processes."""
        self._replacement, self._sorted = (indices, dz, hidden, x, dy), None
        self.num_tokens = indices.shape[0]

    def sorted(self) -> SortedPairs:
        """The pairs grouped by expert; sorted once per step."""
        if self._sorted is None:
            indices, dz = self.factors()[:2]
            self._sorted = backend_for(dz).sort_pairs(indices, self.shapes[0][0])
        return self._sorted

    def table_factors(self, which: Table) -> tuple[SortedPairs, Tensor, Tensor]:
        """Pairs, weights [T, K, E] and vectors [T, D or D_out] whose outer products make one table's gradient."""
        _, dz, hidden, x, dy = self.factors()
        return (self.sorted(), dz, x) if which == "down" else (self.sorted(), hidden, dy)

    def norm_squared(self) -> Tensor:
        """Sum of squares of both tables' gradients, 0-d float32."""
        backend = backend_for(*self.factors()[1:])
        down = backend.row_norm_squared(*self.table_factors("down"))
        return down + backend.row_norm_squared(*self.table_factors("up"))

    def write_dense(self, which: Table, out: Tensor) -> None:
        """Write one table's gradient into `out`, [N, E, D] of zeros."""
        pairs, weights, vectors = self.table_factors(which)
        backend_for(weights, vectors).table_gradient(pairs, weights, vectors, out)

    def materialize(self) -> tuple[Tensor, Tensor, Tensor]:
        """row_ids [R], gradient rows of expert_down [R, E, D] and expert_up [R, E, D_out]: for inspection, not for
        training."""
        rows: list[Tensor] = []
        for which, shape in zip(TABLES, self.shapes):
            pairs, weights, vectors = self.table_factors(which)
            out = torch.zeros(int(pairs.num_rows), *shape[1:], dtype=torch.float32, device=weights.device)
            backend_for(weights, vectors).table_gradient(pairs, weights, vectors, out, compact=True)
            rows.append(out)
        return self.sorted().row_ids[: rows[0].shape[0]], rows[0], rows[1]


def _bytes_per_token(factors: tuple[Tensor, ...]) -> int:
    return sum(factor[0].numel() * factor.element_size() if factor.shape[0] else 0 for factor in factors)


def rowwise_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float = 1.0,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    seed: int,
    missed: MissedSteps | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101, algorithm 2) on the touched rows of a table, in one pass, in place.

    Args:
        param: [N, E, D], float32 or bfloat16.
        exp_avg: like param, float32 or bfloat16.
        exp_avg_sq: like exp_avg; or float32 [N], the running mean square of a row's whole gradient.
        pairs, weights [T, K, E], vectors [T, D]: row n's gradient is grad_scale * sum over its pairs of weights x
            vectors.
        bias_correction1, bias_correction2: 1 - beta ** step.
        seed: bfloat16 values are rounded stochastically by a hash of (seed, row, element), so a step can be repeated.
        missed: the steps that the rows have missed, which are made good first, and whose `last_use` is set; None: a
            missed step changes nothing.
    Raises:
        ValueError: a shape, dtype or device is invalid, or param or a moment is not contiguous.
    """
    require_adamw_state(param, exp_avg, exp_avg_sq)
    require_last_use(param, missed)
    require_one_device(param=param, order=pairs.order, weights=weights, vectors=vectors)
    _require_factors_of(param, weights, vectors)
    backend_for(param).rowwise_adamw_(
        param,
        exp_avg,
        exp_avg_sq,
        pairs,
        weights,
        vectors,
        grad_scale=grad_scale,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction1=bias_correction1,
        bias_correction2=bias_correction2,
        seed=seed,
        missed=missed,
    )


UPDATE_RMS = 0.2
"""Root mean square of a normalized update's elements in units of the learning rate: about AdamW's in training (0.2 to
0.4; arXiv 2502.16982, section 2.2), so that one rate serves both."""


def rowwise_normalized_(
    param: Tensor,
    momentum: Tensor | None,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float = 1.0,
    lr: float,
    beta: float,
    eps: float,
    weight_decay: float,
    seed: int,
    missed: MissedSteps | None = None,
) -> None:
    """One step of orthogonalised momentum (Muon's update) on the touched rows of a table, in one pass, in place.

    An expert's block is a matrix M [E, D] of its own: m <- beta m + (1 - beta) g, and with Nesterov's
    u = beta m + (1 - beta) g

        w <- (1 - lr weight_decay) w - lr UPDATE_RMS A^(-1/2) u,   A = u u^T / max(E, D) + eps^2 I,

    so each update of a block has the root mean square UPDATE_RMS lr, whatever the size of its gradient. For E = 1 that
    is the row over its root mean square; for E > 1, A also gets DAMPING times its mean diagonal (ops/reference.py).

    Args:
        param: [N, E, D], float32 or bfloat16.
        momentum: like param, float32 or bfloat16; None: the gradient alone is normalized.
        pairs, weights, vectors, grad_scale, seed: as for `rowwise_adamw_`.
        missed: as there, with beta1 = `beta`: a missed step decays momentum and weights, but moves nothing.
    Raises:
        ValueError: a shape, dtype or device is invalid, or param or momentum is not contiguous.
    """
    require_momentum(param, momentum)
    require_last_use(param, missed)
    require_one_device(param=param, order=pairs.order, weights=weights, vectors=vectors)
    _require_factors_of(param, weights, vectors)
    backend_for(param).rowwise_normalized_(
        param,
        momentum,
        pairs,
        weights,
        vectors,
        grad_scale=grad_scale,
        step_size=lr * UPDATE_RMS,
        beta=beta,
        eps=eps,
        decay=1 - lr * weight_decay,
        seed=seed,
        missed=missed,
    )


def _require_factors_of(param: Tensor, weights: Tensor, vectors: Tensor) -> None:
    if (weights.shape[2], vectors.shape[1]) != param.shape[1:]:
        raise ValueError(
            f"weights {list(weights.shape)} and vectors {list(vectors.shape)}: must be [T, K, E] and [T, D] for param "
            f"{list(param.shape)}"
        )
