"""What happens inside a step, by parameter group: gradient and weight norms, update-to-weight ratios, attention logits.

Reported every `metrics.detail_freq` steps; other steps cost nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_peer.distributed.collectives import local, max_over_processes, shard_group, sum_over_processes
from titan_peer.metrics.callback import Callback, Run, Step
from titan_peer.metrics.held_out_loss import evaluation_mode
from titan_peer.model import MLA, Transformer
from titan_peer.optim.groups import group_of_each
from titan_peer.optim.optimizers import Optimizers


class Details(Callback):
    """Reports the details of every `freq`-th step.

    `grad_norm/GROUP` is the norm before clipping. `update_ratio/GROUP` is |update| / |weights|: about 1e-3 is usual; of
    expert tables with the row-wise update, both are those of the rows that the step used. `attention_logit_max/LAYER`
    is the largest logit of the softmax, over heads and places of one sequence per process, after the step.
    """

    def __init__(self, run: Run, freq: int) -> None:
        self.run, self.freq = run, freq
        self.groups = _Groups(run.model, run.optimizers)
        self.sequence = _LastSequence(run.model)
        self._found: dict[str, float] = {}

    @classmethod
    def of(cls, run: Run) -> Details | None:
        freq = run.config.metrics.detail_freq
        return cls(run, freq) if freq else None

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if step % self.freq == 0:
            self._found = self.groups.gradient_norms()
            self.groups.remember_weights()

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        if step.number % self.freq:
            return
        found = {**self._found, **self.groups.weights_and_updates()}
        with self.run.precision():
            largest = largest_logits(self.run.model, self.sequence.tokens, self.sequence.document_ids)
        found.update({f"attention_logit_max/{layer}": value for layer, value in largest.items()})
        self.run.metrics.log_record({"step": step.number, **found})


class _Groups:
    """Norms over the parameters of each group, of all processes."""

    def __init__(self, model: Transformer, optimizers: Optimizers) -> None:
        self.optimizers = optimizers
        self.members: dict[str, list[Tensor]] = {}
        for parameter, name in group_of_each(model).items():
            self.members.setdefault(name, []).append(parameter)
        self._before: dict[Tensor, tuple[Tensor | None, Tensor]] = {}

    def gradient_norms(self) -> dict[str, float]:
        squares = [
            _Square(name, _sum_of_squares(parameter.grad), parameter)
            for name, members in self.members.items()
            for parameter in members
            if parameter.grad is not None
        ]
        for module, collector in zip(self.optimizers.experts, self.optimizers.collectors):
            if not collector.is_empty:
                squares.append(_Square("expert_tables", collector.norm_squared(), module.expert_down))
        return {f"grad_norm/{name}": norm for name, norm in _norms(squares).items()}

    def remember_weights(self) -> None:
        """Copy the weights that the step will change: of tables with the row-wise update, the rows in use."""
        used = dict(self.optimizers.rows_in_use())
        for parameter in (parameter for members in self.members.values() for parameter in members):
            rows_used, weights = used.get(parameter), local(parameter)
            self._before[parameter] = rows_used, weights.clone() if rows_used is None else weights[rows_used]

    def weights_and_updates(self) -> dict[str, float]:
        weights, updates = [], []
        for name, members in self.members.items():
            for parameter in members:
                rows, before = self._before.pop(parameter)
                after = local(parameter) if rows is None else local(parameter)[rows]
                weights.append(_Square(name, _sum_of_squares(after), parameter))
                updates.append(_Square(name, _sum_of_squares(after - before), parameter))
        of_weights, of_updates = _norms(weights), _norms(updates)
        found = {f"weight_norm/{name}": norm for name, norm in of_weights.items()}
        ratios = {name: of_updates[name] / norm for name, norm in of_weights.items() if norm > 0}
        return {**found, **{f"update_ratio/{name}": ratio for name, ratio in ratios.items()}}


class _Square(NamedTuple):
    """A sum of squares over this process's part of something shaped like a parameter."""

    group: str
    value: Tensor  # 0-d float32
    parameter: Tensor


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return local(tensor).float().square().sum()


def _norms(squares: list[_Square]) -> dict[str, float]:
    """The norm over each parameter group. One sum over processes for each way in which parameters are sharded."""
    totals: dict[str, float] = {}
    for processes in dict.fromkeys(shard_group(square.parameter) for square in squares):
        some = [square for square in squares if shard_group(square.parameter) is processes]
        values = torch.stack([square.value for square in some]).double()
        if processes is not None:
            sum_over_processes(values, processes)
        for square, value in zip(some, values.tolist()):
            totals[square.group] = totals.get(square.group, 0.0) + value
    return {name: total**0.5 for name, total in totals.items()}


class _LastSequence:
    """Keeps the first sequence of the last batch that the model was trained on."""

    def __init__(self, model: Transformer) -> None:
        self.tokens = self.document_ids = torch.empty(0)
        model.register_forward_pre_hook(self._keep)

    def _keep(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if model.training:
            self.tokens, self.document_ids = inputs[0][:1], inputs[1][:1]


@torch.no_grad()
def largest_logits(model: Transformer, tokens: Tensor, document_ids: Tensor) -> dict[int, float]:
    """The largest attention logit of each block, over heads and places that attend to each other, on all processes.

    Runs the model uncompiled, in evaluation mode. Each process may have tokens of its own.

    Args:
        tokens, document_ids: int64 [1, S].
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    attends = (places[:, None] >= places) & (document_ids[0, :, None] == document_ids[0])
    largest: dict[int, Tensor] = {}

    def measure(layer: int, mla: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(mla, MLA)
        x, rope = inputs[:2]
        queries = torch.cat(mla.queries(x, rope), dim=-1)[0].float()  # [S, H, qk_head_dim]
        keys = mla.expand(*mla.latents(x, rope))[0][0].float()
        of_heads = [(queries[:, head] @ keys[:, head].T)[attends].amax() for head in range(mla.n_heads)]
        largest[layer] = torch.stack(of_heads).amax() * mla.softmax_scale

    hooks = [
        module.register_forward_pre_hook(partial(measure, layer))
        for layer, block in enumerate(model.layers)
        for module in block.modules()
        if isinstance(module, MLA)
    ]
    try:
        with evaluation_mode(model, "force_eager"):
            model(tokens, document_ids)
    finally:
        for hook in hooks:
            hook.remove()
    of_all = max_over_processes(torch.stack([largest[layer] for layer in sorted(largest)]))
    return dict(zip(sorted(largest), of_all.tolist()))
