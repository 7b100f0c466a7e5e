"""A remedy for dead experts: sub-keys that a head never chooses are re-initialised from chosen ones, with their
experts.

An expert is retrieved by its sub-keys, so new weights alone cannot revive it. A dead sub-key therefore becomes a copy,
plus noise, of a used one that is picked in proportion to its use; the two then share the tokens of the used one.
Experts on the revived sub-key that no head used get the weights and optimizer state of their counterparts on the copied
one, so that they start as well as those; experts that another head uses keep their own.

Counters run from one revival to the next; a resumed job starts counting from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_peer.distributed.collectives import sum_over_processes
from titan_peer.experts.usage import DEAD_AFTER, Counts, ExpertUsage
from titan_peer.metrics.callback import Callback, Run, Step
from titan_peer.model import PEER, Experts, Transformer, peer_layers
from titan_peer.optim.optimizers import Optimizers

_NOISE = 0.1
"""Standard deviation of the noise on a copied sub-key, relative to the root mean square of the sub-keys."""
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class DeadKeys:
    """Sub-keys of one product-key axis of a layer that are to be replaced, and their replacements; tensors int64
    [R]."""

    axis: int
    key_sets: Tensor
    """The head, or 0 if heads share their sub-keys."""
    dead: Tensor
    sources: Tensor


def find_dead_keys(
    counts: Tensor, product_key_dim: list[int], key_sets: int, generator: torch.Generator
) -> list[DeadKeys]:
    """The sub-keys that were never chosen although uniform usage would have chosen them at least DEAD_AFTER times.

    Args:
        counts: int64 [H, N] on the CPU.
        key_sets: H, or 1 if heads share their sub-keys.
    """
    heads = counts.shape[0]
    grid = counts.view(heads, *product_key_dim)
    found = []
    for axis, num_keys in enumerate(product_key_dim):
        others = [1 + other for other in range(len(product_key_dim)) if other != axis]
        uses = grid.sum(others) if others else grid  # [H, n_c]
        if key_sets == 1:
            uses = uses.sum(0, keepdim=True)
        expected = uses.sum(1, keepdim=True) / num_keys
        is_dead = (uses == 0) & (expected >= DEAD_AFTER)
        which, dead = is_dead.nonzero(as_tuple=True)
        if len(dead):
            sources = torch.multinomial(uses[which].double(), 1, generator=generator)[:, 0]
            found.append(DeadKeys(axis, which, dead, sources))
    return found


def counterparts(keys: DeadKeys, product_key_dim: list[int]) -> tuple[Tensor, Tensor]:
    """The experts on dead sub-keys, and the experts with the replacing sub-keys and otherwise equal coordinates."""
    stride = 1
    for num_keys in product_key_dim[keys.axis + 1 :]:
        stride *= num_keys
    num_keys = product_key_dim[keys.axis]
    num_experts = torch.Size(product_key_dim).numel()
    with_key_0 = torch.arange(num_experts).view(-1, num_keys, stride)[:, 0].flatten()  # [N / n_c]
    dead = (with_key_0 + keys.dead[:, None] * stride).flatten()
    return dead, (with_key_0 + keys.sources[:, None] * stride).flatten()


def copy_rows(tensor: Tensor, sources: Tensor, targets: Tensor) -> None:
    """tensor[targets] = tensor[sources], also for rows sharded over processes. All processes of the mesh must call it.

    Args:
        tensor: [N, ...]; a DTensor must be sharded on the first dim over a one-dimensional mesh.
        sources, targets: int64 [R], without a common element.
    """
    if not isinstance(tensor, DTensor):
        where = tensor.device
        for some_sources, some_targets in zip(sources.split(_ROWS_AT_A_TIME), targets.split(_ROWS_AT_A_TIME)):
            tensor[some_targets.to(where)] = tensor[some_sources.to(where)]
        return
    local, mesh = tensor.to_local(), tensor.device_mesh
    first = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())
    for some_sources, some_targets in zip(sources.split(_ROWS_AT_A_TIME), targets.split(_ROWS_AT_A_TIME)):
        # float32 for the sum of rounded states; integers are summed as they are
        dtype = torch.float32 if local.is_floating_point() else local.dtype
        rows = torch.zeros(len(some_sources), *local.shape[1:], dtype=dtype, device=local.device)
        mine = (some_sources >= first) & (some_sources < first + local.shape[0])
        rows[mine] = local[some_sources[mine] - first].to(dtype)
        sum_over_processes(rows, mesh.get_group())  # each row is on one process
        mine = (some_targets >= first) & (some_targets < first + local.shape[0])
        local[some_targets[mine] - first] = rows[mine].to(local.dtype)


class ExpertRevival(Callback):
    """Revives dead sub-keys and experts of a model in training every `freq` steps.

    Args:
        seed: of the choice of sources and the noise; the same on all processes.
        say: prints a line, on the first process.
    """

    def __init__(
        self, model: Transformer, optimizers: Optimizers, *, freq: int, seed: int, say: Callable[[str], None] = print
    ) -> None:
        self.model, self.optimizers, self.freq, self.seed, self.say = model, optimizers, freq, seed, say
        self.usage = ExpertUsage(model)

    @classmethod
    def of(cls, run: Run) -> ExpertRevival | None:
        freq, seed = run.config.training.reinit_dead_experts_freq, run.config.debug.seed
        return cls(run.model, run.optimizers, freq=freq, seed=seed, say=run.metrics.print) if freq else None

    def after_update(self, step: Step) -> None:
        if step.number % self.freq == 0:
            for line in self.revive(step.number):
                self.say(line)

    @torch.no_grad()
    def revive(self, step: int) -> list[str]:
        """Revive what was dead since the last call; returns a line to log for each layer with dead sub-keys.

        Every process must call it.
        """
        window = self.usage.read()
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
        lines = []
        for layer, peer in peer_layers(self.model):
            keys, experts = self._revive_layer(peer, layer, window, generator)
            if keys:
                lines.append(
                    f"step {step:>6}  layer {layer}: {keys:,} dead sub-keys re-initialised from used ones, and "
                    f"{experts:,} unused experts with them"
                )
        self.optimizers.refresh_copies()
        return lines

    def _revive_layer(
        self, peer: PEER, layer: int, window: dict[int, Counts], generator: torch.Generator
    ) -> tuple[int, int]:
        counts = window[layer].counts.cpu()
        # an expert of shared tables is used if any of the layers uses it
        of_table = window.values() if peer.experts is None else [window[layer]]
        used = sum((usage.counts.sum(0).cpu() for usage in of_table), torch.zeros(counts.shape[1])) > 0
        experts = peer.experts if peer.experts is not None else self.model.shared_experts
        assert experts is not None
        product_key_dim = self.model.args.peer.product_key_dim
        num_keys = num_experts = 0
        for keys in find_dead_keys(counts, product_key_dim, peer.sub_keys[0].shape[0], generator):
            self._replace_keys(peer.sub_keys[keys.axis], keys, generator)
            dead, sources = counterparts(keys, product_key_dim)
            copied = ~used[dead] & used[sources]
            dead, sources = dead[copied], sources[copied]
            # heads may revive the same sub-key from different sources, but an expert needs exactly one
            order = dead.argsort(stable=True)
            is_first = torch.cat([torch.ones(1, dtype=torch.bool), dead[order][1:] != dead[order][:-1]])[: len(dead)]
            dead, sources = dead[order][is_first], sources[order][is_first]
            for tensor in self._with_state(experts):
                copy_rows(tensor, sources, dead)
            num_keys, num_experts = num_keys + len(keys.dead), num_experts + len(dead)
        return num_keys, num_experts

    def _replace_keys(self, parameter: Tensor, keys: DeadKeys, generator: torch.Generator) -> None:
        for name, tensor in (("weight", parameter.detach()), *self._state(parameter)):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            new = whole[keys.key_sets.to(whole.device), keys.sources.to(whole.device)]
            if name == "weight":
                noise = torch.randn(new.shape, generator=generator).to(new)
                new = new + _NOISE * whole.square().mean().sqrt() * noise
            whole[keys.key_sets.to(whole.device), keys.dead.to(whole.device)] = new
            if isinstance(tensor, DTensor):
                mine = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
                tensor.to_local().copy_(mine.to_local())

    def _state(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state for each element or row of a parameter."""
        yield from ((name, t) for name, t in self.optimizers.state_of(parameter).items() if t.ndim > 0)

    def _with_state(self, experts: Experts) -> Iterator[Tensor]:
        for table in experts.parameters():
            yield table.detach()
            yield from (tensor for _, tensor in self._state(table))
