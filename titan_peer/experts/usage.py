"""Which experts are used: counting on device, and the statistics of what was counted.

A hook on a PEER layer's routing gives its indices and gates to an operator, which adds them to counters on the device:
tokens x heads x k additions per layer, no synchronisation, nothing of the size of the table. The counters are read,
summed over processes and cleared only when a report is due. Each process counts its own tokens over all experts, so
sharded expert tables change nothing.

Shapes: T tokens, H heads, k experts per head, N experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_peer.distributed.collectives import sum_over_processes
from titan_peer.metrics.sinks import Histogram
from titan_peer.model import PEER, Transformer, peer_layers

DEAD_AFTER = 10.0
"""An expert is dead if uniform usage would have used it this often since its last use (probability by chance:
e^-10)."""
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
"""Percentiles of a layer's experts, by load."""
LOAD_EDGES = (0.0, *(2.0**power for power in range(-6, 15)))
"""Bins of the histogram of loads, in multiples of uniform usage; unused experts are in the first."""

# --------------------------------------------------------------------------------------------------------------------
# Counting


@torch.library.custom_op("titan_peer::count_experts", mutates_args=("counts", "gate_sums"))
def count_experts(counts: Tensor, gate_sums: Tensor, indices: Tensor, gates: Tensor) -> None:
    """Add the experts of T tokens to the counters of a layer.

    Args:
        counts: int32 [H, N]; a head takes an expert at most once per token, so there is room for 2**31 tokens.
        gate_sums: float32 [H, N].
        indices: int64 [T, H, k]; negative ones (padding) are not counted.
        gates: [T, H, k].
    """
    if torch._C._current_graph_task_id() != -1:  # in a backward pass: activation checkpointing repeats the forward
        return
    heads, num_experts = counts.shape
    first = torch.arange(0, heads * num_experts, num_experts, device=indices.device)
    places = (indices.clamp_min(0) + first[:, None]).flatten()
    present = (indices >= 0).flatten()
    counts.view(-1).scatter_add_(0, places, present.to(counts.dtype))
    gate_sums.view(-1).scatter_add_(0, places, torch.where(present, gates.flatten().to(gate_sums.dtype), 0))


@count_experts.register_fake
def _(counts: Tensor, gate_sums: Tensor, indices: Tensor, gates: Tensor) -> None:
    return None


@dataclass(eq=False)
class _Counter:
    """The hook that counts one layer."""

    in_training: bool
    counts: Tensor
    gate_sums: Tensor

    def __call__(self, peer: PEER, indices: Tensor, gates: Tensor) -> None:
        if peer.training == self.in_training:
            count_experts(self.counts, self.gate_sums, indices, gates.detach())


@dataclass
class Counts:
    """The expert usage of one PEER layer in a window, over all processes."""

    counts: Tensor
    """int64 [H, N]: how often a head took an expert."""
    gate_sums: Tensor
    """float32 [H, N]: the sum of the gates that a head gave an expert."""
    idle: Tensor
    """float32 [N]: how often uniform usage would have used an expert since its last use."""

    @property
    def expected(self) -> float:
        """Uses per expert in the window if usage were uniform."""
        return float(self.counts.sum()) / self.counts.shape[1]


class ExpertUsage:
    """Counts the experts that a model's PEER layers use, from now on until `detach`.

    Made when the model is on its device and before its first forward pass.

    Args:
        in_training: count when the model is in training mode, and not in evaluation; False: the other way round.
    """

    def __init__(self, model: Transformer, *, in_training: bool = True) -> None:
        self._counters: dict[int, _Counter] = {}
        self._layers = dict(peer_layers(model))
        self._idle: dict[int, Tensor] = {}
        num_experts = model.args.peer.num_experts
        for layer, peer in self._layers.items():
            device = peer.wq.weight.device
            shape = (peer.num_heads, num_experts)
            counts = torch.zeros(shape, dtype=torch.int32, device=device)
            gate_sums = torch.zeros(shape, dtype=torch.float32, device=device)
            self._counters[layer] = _Counter(in_training, counts, gate_sums)
            self._idle[layer] = torch.zeros(num_experts, device=device)
            peer.attach("count", self._counters[layer])

    def detach(self) -> None:
        """Count no more."""
        for layer, peer in self._layers.items():
            peer.detach(self._counters[layer])

    def read(self) -> dict[int, Counts]:
        """What was counted since the last call, per layer, summed over processes; the counters are reset.

        Every process must call it.
        """
        window = {}
        for layer, counter in self._counters.items():
            total, gates = counter.counts.long(), counter.gate_sums.clone()
            counter.counts.zero_()
            counter.gate_sums.zero_()
            sum_over_processes(total)
            sum_over_processes(gates)
            used = total.sum(0) > 0
            idle = self._idle[layer]
            idle.add_(total.sum() / total.shape[1]).masked_fill_(used, 0.0)
            window[layer] = Counts(total, gates, idle.clone())
        return window


# --------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Spread:
    """How evenly the gates of a window are distributed over the experts."""

    share_used: float
    """Share of the experts that were used at least once."""
    unevenness: float
    """KL divergence of the gate-weighted usage from the uniform distribution, nats (arXiv 2407.04153, section 3.3)."""
    gini: float
    """Gini coefficient of the gate-weighted usage: 0 if all are equal, near 1 if one expert has everything."""


@dataclass(frozen=True)
class HotExpert:
    expert: int
    load: float
    """Its share of the gates, in multiples of the uniform share."""
    count: int


@dataclass(frozen=True)
class LayerUsage:
    """The report of one PEER layer."""

    layer: int
    num_experts: int
    expected: float
    """Uses per expert in the window if usage were uniform; if far below 1, a small share_used says little."""
    whole: Spread
    heads: list[Spread]
    dead: int
    """Experts that uniform usage would have used `DEAD_AFTER` times since their last use."""
    hot: list[HotExpert]
    """The most loaded experts, descending."""
    histogram: Histogram
    """Histogram of the experts' loads, in multiples of the uniform share of the gates."""
    percentiles: list[float]
    """The load at each of PERCENTILES."""
    ranks: list[int]
    loads_at_ranks: list[float]
    """The rank-frequency curve: loads at some ranks (1: the most loaded), evenly spaced on a logarithmic axis."""

    def scalars(self) -> dict[str, float]:
        """The numbers by name, for a metrics record."""
        prefix = f"expert_usage/layer_{self.layer}"
        found = {f"{prefix}/{name}": value for name, value in vars(self.whole).items()}
        found[f"{prefix}/dead"] = self.dead
        found[f"{prefix}/max_load"] = self.hot[0].load
        for head, spread in enumerate(self.heads):
            found |= {f"{prefix}/head_{head}/{name}": value for name, value in vars(spread).items()}
        return found


def _spread(counts: Tensor, gate_sums: Tensor) -> tuple[Spread, Tensor]:
    """The spread of counts and gate sums [N]; also the shares of the gates, ascending, float64 [N]."""
    shares, num_experts = gate_sums.double().sort().values, gate_sums.numel()
    shares = shares / shares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    unevenness = math.log(num_experts) + float(torch.xlogy(shares, shares).sum()) if shares.any() else 0.0
    ranks = torch.arange(1, num_experts + 1, dtype=torch.float64, device=shares.device)
    gini = float(2 * (ranks * shares).sum() / num_experts) - (num_experts + 1) / num_experts if shares.any() else 0.0
    return Spread(float((counts > 0).double().mean()), max(unevenness, 0.0), max(gini, 0.0)), shares


def layer_usage(layer: int, window: Counts, *, num_hot: int = 10) -> LayerUsage:
    """The statistics of a layer's window."""
    counts, gate_sums = window.counts.sum(0), window.gate_sums.sum(0)
    num_experts = counts.numel()
    whole, ascending = _spread(counts, gate_sums)
    loads = ascending * num_experts
    top = gate_sums.topk(min(num_hot, num_experts)).indices.tolist()
    scale = num_experts / max(float(gate_sums.sum()), torch.finfo(torch.float32).tiny)
    places = [min(round(p / 100 * (num_experts - 1)), num_experts - 1) for p in PERCENTILES]
    ranks = sorted({round(num_experts ** (i / 199)) for i in range(200)})
    edges = torch.tensor(LOAD_EDGES[1:-1], dtype=torch.float64, device=loads.device)
    bins = torch.bincount(torch.bucketize(loads, edges, right=True), minlength=len(LOAD_EDGES) - 1)
    return LayerUsage(
        layer=layer,
        num_experts=num_experts,
        expected=window.expected,
        whole=whole,
        heads=[_spread(c, g)[0] for c, g in zip(window.counts, window.gate_sums)],
        dead=int((window.idle >= DEAD_AFTER).sum()),
        hot=[HotExpert(e, float(gate_sums[e]) * scale, int(counts[e])) for e in top],
        histogram=Histogram(LOAD_EDGES, bins.tolist()),
        percentiles=loads[torch.tensor(places, device=loads.device)].tolist(),
        ranks=ranks,
        loads_at_ranks=loads[num_experts - torch.tensor(ranks, device=loads.device)].tolist(),
    )
