"""The exponential moving average of the weights (training.ema_decay), in float32.

With the weights w_1, w_2, ... after each update and the decay b, the average after t updates is

    a_t = (1 - b) / (1 - b^t) * sum over i = 1..t of b^(t-i) w_i.

The factor makes the coefficients sum to one, as in Adam's bias correction: the weights before the first update have no
part in it, and over the first few updates it is nearly their mean. From a_s, if the weights were w in all of the updates
s + 1 to t, follows

    a_t = p a_s + (1 - p) w,    p = b^(t-s) (1 - b^s) / (1 - b^t).

Parameters that every update changes are averaged in every update, s = t - 1. A row of an expert table with the row-wise
update keeps its weights until it is used: its average is brought up to date before a step changes it, and before
anything reads the averages. So the cost of an update follows the rows that it uses.

Running statistics of batch norm are averaged like the weights. They are then those that the averaged models saw, not
those that the average itself would see; only passes over data could tell these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from titan_peer.distributed.collectives import local
from titan_peer.distributed.float8 import master_weight
from titan_peer.model import QueryBatchNorm, Transformer

_ROWS_AT_A_TIME = {"cpu": 1 << 10, "cuda": 1 << 16}
"""By device: on a CPU they stay in its cache, on a GPU they take few launches."""
_SWAPPED_AT_A_TIME = 1 << 22  # elements


class WeightAverage:
    """Averages of a model's parameters and running statistics, each sharded as what it is the average of.

    Args:
        decay: b, above 0 and below 1.
        rowwise_tables: expert tables [N, E, D] of which an update changes only the rows in use.
    """

    def __init__(self, model: Transformer, decay: float, rowwise_tables: Iterable[Tensor]) -> None:
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.int64)
        """t, 0-d on the CPU."""
        self._weights = _weights(model)
        self._averages = {w: torch.zeros_like(master_weight(w.detach())) for w in self._weights.values()}
        self._row_updates = {
            table: torch.zeros_like(table[:, 0, 0].detach(), dtype=torch.int32) for table in rowwise_tables
        }
        """Of each row [N]: s, the update up to which its average is made."""

    # ---- an update

    @torch.no_grad()
    def before_update(self, rows_in_use: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Call before an update changes the weights.

        Args:
            rows_in_use: row-wise tables, each with the rows, int64 [R] of this process' part, that will change.
        """
        for table, rows in rows_in_use:
            weights, average, since = local(table), local(self._averages[table]), local(self._row_updates[table])
            for part in rows.split(_ROWS_AT_A_TIME[rows.device.type]) if self.updates else ():
                # index_select copies rows as a whole, unlike average[part]
                new = 1 - self._kept(since.index_select(0, part))
                brought = average.index_select(0, part).lerp_(weights.index_select(0, part), new)
                average.index_copy_(0, part, brought)
            since.index_fill_(0, rows, int(self.updates))

    @torch.no_grad()
    def after_update(self) -> None:
        """Call when an update has changed the weights."""
        self.updates += 1
        kept = self._kept(torch.tensor([int(self.updates) - 1])).item()
        dense = [w for w in self._weights.values() if w not in self._row_updates]
        averages, weights = [local(self._averages[w]) for w in dense], [_own(w) for w in dense]
        torch._foreach_lerp_(averages, weights, 1 - kept)

    def _kept(self, since: Tensor) -> Tensor:
        """p for averages that are made up to the updates `since` [R]; float32 [R, 1, 1]."""
        log_b, t, s = math.log(self.decay), int(self.updates), since.double()
        kept = torch.exp((t - s) * log_b) * torch.expm1(s * log_b) / math.expm1(t * log_b)
        return kept.float()[:, None, None]

    # ---- reading

    @torch.no_grad()
    def bring_up_to_date(self) -> None:
        """Bring the rows of all tables up to the last update; the others always are."""
        for table, row_updates in self._row_updates.items() if self.updates else ():
            weights, average, since = _own(table), local(self._averages[table]), local(row_updates)
            rows = _ROWS_AT_A_TIME[since.device.type]
            for w, a, s in zip(*(tensor.split(rows) for tensor in (weights, average, since))):
                a.lerp_(w, 1 - self._kept(s))
            since.fill_(int(self.updates))

    def named_tensors(self) -> dict[str, Tensor]:
        """The averages after the last update, by the names of what they are averages of."""
        self.bring_up_to_date()
        return {name: self._averages[weight] for name, weight in self._weights.items()}

    @torch.no_grad()
    def swap_with_weights(self) -> None:
        """Exchange averages and weights, to the last bit. Call it twice, without an update in between."""
        self.bring_up_to_date()
        for weight, average in self._averages.items():
            parts = (t.view(-1).split(_SWAPPED_AT_A_TIME) for t in (_own(weight), local(average)))
            for ours, theirs in zip(*parts):
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)

    @property
    def nbytes(self) -> int:
        return sum(local(t).nbytes for kept in (self._averages, self._row_updates) for t in kept.values())

    # ---- state that is written from outside

    def state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """What is kept for a parameter, by name, with one value for each of its elements or rows."""
        state = {"average": self._averages[weight]}
        return state | ({"row_updates": self._row_updates[weight]} if weight in self._row_updates else {})

    def loaded(self) -> None:
        """Call when all averages and `updates` have been loaded, as `named_tensors` had returned them."""
        for since in self._row_updates.values():
            local(since).fill_(int(self.updates))

    def start_anew(self) -> None:
        """Forget the averages: the next update is the first one."""
        self.updates.zero_()
        self.loaded()


def _weights(model: Transformer) -> dict[str, Tensor]:
    """What is averaged, by its name in checkpoints."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        if isinstance(module, QueryBatchNorm):
            named.update({f"{prefix}.{name}": buffer for name, buffer in module.named_buffers()})
    return {name.replace(_CHECKPOINT_PREFIX, ""): tensor for name, tensor in named.items()}


def _own(weight: Tensor) -> Tensor:
    """This process' part of a weight, in float32."""
    return local(master_weight(weight))
