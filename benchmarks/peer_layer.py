"""The whole training step of one layer (forward, backward, optimizer), for PEER layers and dense feed-forward layers.

Contenders take turns: in each round every contender runs some steps in a separate process, so that its peak memory can
be measured and a slow period of the machine affects all contenders. Times are medians over all rounds.

Examples:
    python benchmarks/peer_layer.py                                        # every size: some minutes on two CPU cores
    python benchmarks/peer_layer.py --experts 16384 --rounds 5
    python benchmarks/peer_layer.py --experts 1048576 --contenders titan_peer pytorch_peer
    python benchmarks/peer_layer.py --device cuda --tokens 16384 --dtype bfloat16

`pytorch_peer` is lucidrains' PEER-pytorch (pip install PEER-pytorch), as its README uses it, with
torch.optim.AdamW(fused=True); `pytorch_peer_compiled` is the same with torch.compile. titan_peer's layers and the dense
feed-forward layers are compiled, as titan_peer's trainer does by default.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import (
    RESULTS,
    copy_bandwidth,
    device_name,
    markdown_table,
    square_number,
    synchronize,
    versions,
    write_results,
)
from torch import Tensor, nn

from titan_peer.common.command_line import FlagParser
from titan_peer.common.host_memory import keep_freed_memory, peak_resident_bytes
from titan_peer.model import PEER, PEERArgs
from titan_peer.optim.rowwise import RowwiseAdamW

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
NUM_BATCHES = 4  # inputs that rotate, so that a step does not use the rows of the step before


class GatherPEER(PEER):
    """PEER in its simplest form: gather the chosen rows, then einsum."""

    def forward(self, x: Tensor, shared_experts: nn.Module | None = None) -> Tensor:
        assert self.experts is not None
        indices, scores = self.retrieve(x.flatten(0, 1))
        down = self.experts.expert_down[indices.flatten(1), 0]  # [T, K, D]
        hidden = torch.einsum("td,tkd->tk", x.flatten(0, 1), down)
        up = self.experts.expert_up[indices.flatten(1), 0]
        return torch.einsum("tk,tkd->td", self.gate(scores).flatten(1) * F.gelu(hidden), up).view(x.shape)


def _peer_args(options: argparse.Namespace, num_experts: int) -> PEERArgs:
    side = round(num_experts**0.5)
    if side * side != num_experts:
        raise SystemExit(f"--experts {num_experts}: PEER-pytorch needs a square number")
    return PEERArgs(
        num_experts=num_experts,
        product_key_dim=[side, side],
        num_heads=options.heads,
        num_experts_per_tok=options.k,
        query_dim=options.query_dim,
        query_norm=options.query_norm,
    )


def _own_layer(kind: type[PEER]) -> Callable[[argparse.Namespace, int], nn.Module]:
    def make(options: argparse.Namespace, num_experts: int) -> nn.Module:
        layer = kind(options.dim, _peer_args(options, num_experts))
        layer.init_weights(std=0.02, residual_scale=1.0)
        return layer

    return make


def _pytorch_peer(options: argparse.Namespace, num_experts: int) -> nn.Module:
    import PEER_pytorch

    return PEER_pytorch.PEER(
        options.dim,
        heads=options.heads,
        num_experts=num_experts,
        num_experts_per_head=options.k,
        dim_key=options.query_dim // 2,
        non_competing_scores=False,  # softmax over the k chosen; with True this version uses one expert per head
    )


def _feed_forward(
    hidden_dim: Callable[[argparse.Namespace, int], int],
) -> Callable[[argparse.Namespace, int], nn.Module]:
    def make(options: argparse.Namespace, num_experts: int) -> nn.Module:
        width = hidden_dim(options, num_experts)
        up, down = nn.Linear(options.dim, width, bias=False), nn.Linear(width, options.dim, bias=False)
        return nn.Sequential(up, nn.GELU(), down)

    return make


def _equal_flops_width(options: argparse.Namespace, num_experts: int) -> int:
    """Hidden dim of a feed-forward layer of two matrices with as many multiplications as PEER has for queries, scores of
    both axes and experts."""
    queries = options.dim * options.heads * options.query_dim
    scores = options.heads * round(num_experts**0.5) * options.query_dim
    experts = 2 * options.heads * options.k * options.dim
    return round((queries + scores + experts) / (2 * options.dim))


CONTENDERS: dict[str, tuple[str, Callable[[argparse.Namespace, int], nn.Module]]] = {
    "titan_peer": ("titan_peer, row-wise AdamW", _own_layer(PEER)),
    "titan_peer_small_state": ("titan_peer, bf16 first moment, one second moment a row", _own_layer(PEER)),
    "titan_peer_dense": ("titan_peer, dense AdamW", _own_layer(PEER)),
    "pytorch_peer": ("PEER-pytorch", _pytorch_peer),
    "pytorch_peer_compiled": ("PEER-pytorch, compiled", _pytorch_peer),
    "gather": ("gather + einsum", _own_layer(GatherPEER)),
    "ffn_equal_flops": ("dense FFN, equal FLOPs", _feed_forward(_equal_flops_width)),
    "ffn_4x": ("dense FFN, 4x width", _feed_forward(lambda options, _: 4 * options.dim)),
}


NOT_COMPILED = ("pytorch_peer", "gather")


class Step:
    """The layer, optimizer and inputs of a contender; a call runs one training step and returns the milliseconds of its
    phases."""

    def __init__(self, contender: str, options: argparse.Namespace, num_experts: int) -> None:
        self.device = options.device
        dtype = getattr(torch, options.dtype)
        with torch.device(self.device):
            self.layer = CONTENDERS[contender][1](options, num_experts).to(dtype)
            self.batches = [torch.randn(1, options.tokens, options.dim, dtype=dtype) for _ in range(NUM_BATCHES)]
            self.dy = torch.randn(1, options.tokens, options.dim, dtype=dtype)
        self.rowwise: RowwiseAdamW | None = None
        rest = list(self.layer.parameters())
        if contender in ("titan_peer", "titan_peer_small_state"):
            state = {"moment_dtype": torch.bfloat16, "second_moment": "row"} if contender != "titan_peer" else {}
            experts = self.layer.experts
            self.rowwise = RowwiseAdamW([experts], **ADAMW, **state)  # type: ignore[list-item, arg-type]
            tables = set(experts.parameters())  # type: ignore[union-attr, operator]
            rest = [p for p in rest if p not in tables]
        if contender not in NOT_COMPILED:
            self.layer.compile()
        self.adamw = torch.optim.AdamW(rest, **ADAMW, fused=True)
        self.touched_rows = 0

    def __call__(self, i: int) -> tuple[float, float, float]:
        x = self.batches[i % NUM_BATCHES].requires_grad_()
        marks = [self._now()]
        y = self.layer(x)
        marks.append(self._now())
        y.backward(self.dy)
        marks.append(self._now())
        if self.rowwise is not None:
            self.rowwise.step()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        marks.append(self._now())
        x.grad = None
        return tuple((b - a) * 1e3 for a, b in itertools.pairwise(marks))  # type: ignore[return-value]

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def peak_memory(device: str) -> int:
    """The peak of bytes in use: of the process on a CPU, of torch's allocator on a GPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()


def _touched_rows(layer: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return layer.retrieve(x.flatten(0, 1))[0].unique().numel() if isinstance(layer, PEER) else 0


def _worker(connection: Connection, contender: str, options: argparse.Namespace, num_experts: int) -> None:
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the trainer does, for every contender
    torch.manual_seed(0)
    step = Step(contender, options, num_experts)
    for i in range(options.warmup):
        step(i)
    times = [step(i) for i in range(options.steps)]
    peak = peak_memory(options.device)  # before counting rows, which is not part of a step
    connection.send({"times": times, "peak": peak, "rows": _touched_rows(step.layer, step.batches[0])})


def _run_apart(contender: str, options: argparse.Namespace, num_experts: int) -> dict[str, Any]:
    """Run one turn of a contender in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(sender, contender, options, num_experts))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        raise SystemExit(f"{contender} at {num_experts} experts failed; its error is above") from None
    finally:
        process.join()


def bytes_moved(options: argparse.Namespace, rows: int) -> int:
    """The bytes of tables and moments that a row-wise step of titan_peer must read and write; every use of a row counts.

    Forward and backward read a row of each table for every (token, expert) pair; the update reads and writes the weights
    and both moments of each touched row.
    """
    row_bytes = options.dim * (2 if options.dtype == "bfloat16" else 4)
    pairs = options.tokens * options.heads * options.k
    return 2 * row_bytes * (2 * pairs + 6 * rows)


def _touch_memory(size: int) -> None:
    """Touch this many bytes of memory once, in another process. On a virtual machine the first process that touches a
    page is slowed down, and this must not depend on the order of the contenders."""
    process = multiprocessing.get_context("spawn").Process(target=torch.ones, args=(size // 4,))
    process.start()
    process.join()


def measure(options: argparse.Namespace, num_experts: int) -> list[dict[str, Any]]:
    """Measure all contenders at one size, in turns."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for i in range(options.rounds):
        # each round begins with a different contender, because what ran before may matter
        first = i * len(options.contenders) // options.rounds
        for name in (*options.contenders[first:], *options.contenders[:first]):
            turns[name].append(_run_apart(name, options, num_experts))
    results = []
    for name, runs in turns.items():
        phases = [statistics.median(phase) for phase in zip(*(times for run in runs for times in run["times"]))]
        total = statistics.median(sum(times) for run in runs for times in run["times"])
        numbers = dict(zip(("forward", "backward", "optimizer"), phases))
        peak = max(run["peak"] for run in runs)
        results.append({"contender": name, "experts": num_experts, **numbers, "total": total, "peak": peak})
        results[-1]["rows"] = runs[0]["rows"]
    return results


def _table(results: list[dict[str, Any]], options: argparse.Namespace, bandwidth: float) -> str:
    totals = {(r["contender"], r["experts"]): r["total"] for r in results}
    rows = []
    for r in results:
        base = totals.get(("pytorch_peer", r["experts"]))
        floor = f"{bytes_moved(options, r['rows']) / bandwidth * 1e3:.0f}" if r["contender"] == "titan_peer" else ""
        numbers = [f"{r[phase]:.1f}" for phase in ("forward", "backward", "optimizer", "total")]
        speedup = f"{base / r['total']:.2f}x" if base else ""
        label = CONTENDERS[r["contender"]][0]
        rows.append([f"{r['experts']:,}", label, *numbers, speedup, f"{r['peak'] / 1e9:.2f}", floor])
    header = ["experts", "layer", "forward ms", "backward ms", "optimizer ms", "step ms", "speed-up over PEER-pytorch"]
    return markdown_table([*header, "peak GB", "bytes moved / copy bandwidth, ms"], rows)


def _plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axis, key, scale, label in zip(axes, ("total", "peak"), (1, 1e-9), ("training step, ms", "peak memory, GB")):
        for name in dict.fromkeys(r["contender"] for r in results):
            points = [(r["experts"], r[key] * scale) for r in results if r["contender"] == name]
            axis.plot(*zip(*points), marker="o", label=CONTENDERS[name][0])
        axis.set(xscale="log", yscale="log", xlabel="experts", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _parse() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--experts", type=square_number, nargs="+", default=[16384, 65536, 262144, 1048576])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--k", type=int, default=16, help="experts per head")
    parser.add_argument("--query_dim", type=int, default=256, help="query dim per head, over both axes")
    parser.add_argument("--query_norm", choices=["batch", "rms", "none"], default="batch", help="PEER-pytorch has none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for table, JSON and plot")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device)
    if options.device == "cpu":
        _touch_memory(12 * 4 * options.dim * max(options.experts))  # tables, gradients, moments, temporaries
    results = []
    for num_experts in options.experts:
        results += measure(options, num_experts)
        print(_table(results, options, bandwidth), flush=True)
    setting = (
        f"{options.tokens} tokens, dim {options.dim}, {options.heads} heads, k {options.k}, query dim "
        f"{options.query_dim}, {options.dtype}; medians of {options.rounds} x {options.steps} steps in turns"
    )
    text = f"{setting}. Copy bandwidth {bandwidth / 1e9:.1f} GB/s.\n\n{_table(results, options, bandwidth)}"
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    data = {"options": arguments, "copy_bandwidth": bandwidth, "results": results}
    stem = write_results("peer-layer", options.device, text, data, options.output)
    _plot(results, stem.with_suffix(".png"), f"{device_name(options.device)}; {versions()}\n{setting}")
    print(f"written: {stem.name}.md, .json, .png in {options.output}")


if __name__ == "__main__":
    main()
