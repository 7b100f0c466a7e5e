"""Each kernel of the expert operators alone, compared with its floor: the time to move the bytes that it must read and
write, at copy bandwidth.

    python benchmarks/peer_kernels.py                                   # CPU: plain PyTorch and the C++ kernels
    python benchmarks/peer_kernels.py --device cuda --tokens 16384 --dim 1024 --dtype bfloat16
    python benchmarks/peer_kernels.py --experts 1048576 --kernels forward backward --backends cpu

On a GPU triton.testing.do_bench measures the times; it clears the cache before each call. Inputs rotate. A row of a
table counts once per use, so cache hits can make a kernel faster than its floor; tensors that all programs read, such
as x or the sub-keys, count once.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from report import (
    RESULTS,
    copy_bandwidth,
    device_name,
    markdown_table,
    median_ms,
    square_number,
    versions,
    write_results,
)

from titan_peer.common.command_line import FlagParser
from titan_peer.ops import cpu, reference

NUM_BATCHES = 4  # inputs that rotate
ADAMW: dict[str, float] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
ADAMW |= {"bias_correction1": 0.1, "bias_correction2": 0.05}


class Kernel(NamedTuple):
    """A kernel and its floor."""

    run: Callable[[int], object]
    """Runs the kernel on batch i."""
    floor: int
    """Bytes."""


class Setting:
    """Tables and batches of one PEER layer, and the kernels that work on them."""

    def __init__(self, backend: ModuleType, options: argparse.Namespace) -> None:
        self.backend, self.options = backend, options
        torch.manual_seed(0)
        dtype, T, N, D = getattr(torch, options.dtype), options.tokens, options.experts, options.dim
        E, H, k = options.hidden_size, options.heads, options.k
        self.side = round(N**0.5)
        if self.side**2 != N:
            raise SystemExit(f"--experts {N}: must be a square number, for two equal axes")
        with torch.device(options.device):
            self.down, self.up = torch.randn(N, E, D, dtype=dtype), torch.randn(N, E, D, dtype=dtype)
            self.keys = [torch.randn(H, self.side, options.query_dim // 2, dtype=dtype) for _ in range(2)]
            self.x = [torch.randn(T, D, dtype=dtype) for _ in range(NUM_BATCHES)]
            self.queries = [torch.randn(T, H, options.query_dim, dtype=dtype) for _ in range(NUM_BATCHES)]
            self.indices = [torch.randint(N, (T, H * k)) for _ in range(NUM_BATCHES)]
            self.gates, self.z = torch.rand(T, H * k), torch.randn(T, H * k, E)
            self.dvalues = torch.randn(T, H, k)
        self.pairs = [backend.sort_pairs(indices, N) for indices in self.indices]
        self.rows = int(sum(int(pairs.num_rows) for pairs in self.pairs) / NUM_BATCHES)

    def kernels(self) -> dict[str, Callable[[], Kernel]]:
        return {
            "retrieval": self.retrieval,
            "retrieval backward": self.retrieval_backward,
            "forward": self.forward,
            "backward": self.backward,
            "sort": self.sort,
            "table gradient": self.table_gradient,
            "norm": self.norm,
            "adamw": lambda: self.adamw(torch.float32, by_row=False),
            "adamw small state": lambda: self.adamw(torch.bfloat16, by_row=True),
        }

    def retrieval(self) -> Kernel:
        b, keys, k = self.backend, self.keys, self.options.k
        floor = _bytes(self.queries[0], *keys) + self.dvalues.numel() * (4 + 8)
        return Kernel(lambda i: b.retrieve_forward(self.queries[i], keys, k), floor)

    def retrieval_backward(self) -> Kernel:
        b, keys, shape = self.backend, self.keys, self.dvalues.shape
        floor = 2 * _bytes(self.queries[0], *keys) + self.dvalues.numel() * (4 + 8)
        return Kernel(
            lambda i: b.retrieve_backward(self.dvalues, self.indices[i].view(shape), self.queries[i], keys), floor
        )

    def _gathered(self) -> int:
        """The bytes of a row of both tables per use, and of indices and gates."""
        row = self.down[0].numel() * self.down.element_size()
        return self.indices[0].numel() * 2 * row + _bytes(self.indices[0], self.gates)

    def forward(self) -> Kernel:
        b, tables, gates = self.backend, (self.down, self.up), self.gates
        floor = self._gathered() + 2 * _bytes(self.x[0]) + _bytes(self.z)
        return Kernel(lambda i: b.peer_forward(self.x[i], self.indices[i], gates, *tables, "gelu"), floor)

    def backward(self) -> Kernel:
        b, rest = self.backend, (self.z, self.down, self.up, "gelu")
        floor = self._gathered() + 2 * _bytes(self.x[0]) + 3 * _bytes(self.z) + _bytes(self.gates)
        return Kernel(lambda i: b.peer_backward(self.x[i], self.x[i], self.indices[i], self.gates, *rest), floor)

    def sort(self) -> Kernel:
        floor = _bytes(self.indices[0]) + 4 * (self.indices[0].numel() + 2 * self.rows)
        return Kernel(lambda i: self.backend.sort_pairs(self.indices[i], self.down.shape[0]), floor)

    def _factors(self) -> int:
        return _bytes(self.x[0], self.z) + 4 * (self.indices[0].numel() + 2 * self.rows)

    def table_gradient(self) -> Kernel:
        out, row = torch.zeros_like(self.down, dtype=torch.float32), self.down[0].numel()
        return Kernel(
            lambda i: self.backend.table_gradient(self.pairs[i], self.z, self.x[i], out),
            self._factors() + self.rows * row * 4,
        )

    def norm(self) -> Kernel:
        return Kernel(lambda i: self.backend.row_norm_squared(self.pairs[i], self.z, self.x[i]), self._factors())

    def adamw(self, moments: torch.dtype, *, by_row: bool) -> Kernel:
        exp_avg = torch.zeros_like(self.down, dtype=moments)
        exp_avg_sq = torch.zeros(self.down.shape[0], device=self.down.device) if by_row else torch.zeros_like(exp_avg)
        state, row = (self.down, exp_avg, exp_avg_sq), self.down[0].numel()
        width = self.down.element_size() + exp_avg.element_size() * (1 if by_row else 2)
        floor = self._factors() + 2 * self.rows * (row * width + (4 if by_row else 0))
        return Kernel(
            lambda i: self.backend.rowwise_adamw_(
                *state, self.pairs[i], self.z, self.x[i], grad_scale=1.0, **ADAMW, seed=1
            ),
            floor,
        )


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def milliseconds(run: Callable[[int], object], options: argparse.Namespace) -> float:
    if options.device == "cuda":
        from triton.testing import do_bench

        batches = itertools.cycle(range(NUM_BATCHES))
        return float(do_bench(lambda: run(next(batches)), return_mode="median"))
    return median_ms(lambda i: run(i % NUM_BATCHES), options.device, repeats=options.repeats)


def _backends(options: argparse.Namespace) -> dict[str, ModuleType]:
    known: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}
    if options.device == "cuda":
        from titan_peer.ops import triton

        known = {"reference": reference, "triton": triton}
    names = options.backends or list(known)
    if unknown := set(names) - set(known):
        raise SystemExit(f"--backends {', '.join(unknown)}: on {options.device} there are {', '.join(known)}")
    return {name: known[name] for name in names}


def measure(options: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    results = []
    for name, backend in _backends(options).items():
        setting = Setting(backend, options)
        for kernel, make in setting.kernels().items():
            if options.kernels and kernel not in options.kernels:
                continue
            run, floor = make()
            ms = milliseconds(run, options)
            results.append({"kernel": kernel, "backend": name, "ms": ms, "floor_bytes": floor, "rows": setting.rows})
            print(f"{name} {kernel}: {ms:.3f} ms, floor {floor / bandwidth * 1e3:.3f} ms", flush=True)
            del run
    return results


def _table(results: list[dict[str, Any]], bandwidth: float) -> str:
    rows = []
    for r in results:
        floor = r["floor_bytes"] / bandwidth * 1e3
        numbers = [f"{r['ms']:.3f}", f"{r['floor_bytes'] / 1e6:.1f}", f"{floor:.3f}", f"{100 * floor / r['ms']:.0f}%"]
        rows.append([r["kernel"], r["backend"], *numbers])
    return markdown_table(["kernel", "backend", "ms", "MB to move", "floor ms", "of copy bandwidth"], rows)


def _plot(results: list[dict[str, Any]], bandwidth: float, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kernels = list(dict.fromkeys(r["kernel"] for r in results))
    names = list(dict.fromkeys(r["backend"] for r in results))
    figure, axis = plt.subplots(figsize=(10, 0.55 * len(kernels) + 2), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        times = {r["kernel"]: r["ms"] for r in results if r["backend"] == name}
        places = [kernels.index(kernel) + (i - (len(names) - 1) / 2) * height for kernel in times]
        axis.barh(places, times.values(), height, label=name)
    for place, kernel in enumerate(kernels):
        floor = next(r["floor_bytes"] for r in results if r["kernel"] == kernel) / bandwidth * 1e3
        label = "byte floor at copy bandwidth" if place == 0 else None
        axis.plot([floor, floor], [place - 0.45, place + 0.45], color="black", linewidth=2, label=label)
    axis.set(yticks=range(len(kernels)), yticklabels=kernels, xscale="log", xlabel="milliseconds")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3)
    axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


def _parse() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--experts", type=square_number, default=65536)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden_size", type=int, default=1, help="hidden neurons per expert")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--k", type=int, default=16, help="experts per head")
    parser.add_argument("--query_dim", type=int, default=256, help="query dim per head, over both axes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="timed calls on a CPU, of which the median is reported")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="reference, cpu, triton; default: the device's")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="measure only these; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for table, JSON and plot")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device)
    results = measure(options, bandwidth)
    setting = (
        f"{options.tokens} tokens, dim {options.dim}, {options.experts:,} experts of hidden size {options.hidden_size}, "
        f"{options.heads} heads, k {options.k}, query dim {options.query_dim}, {options.dtype}"
    )
    rows = max((r["rows"] for r in results), default=0)
    text = f"{setting}; {rows:,} rows touched. Copy bandwidth {bandwidth / 1e9:.1f} GB/s.\n\n"
    text += _table(results, bandwidth)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    data = {"options": arguments, "copy_bandwidth": bandwidth, "results": results}
    stem = write_results("peer-kernels", options.device, text, data, options.output)
    title = f"{device_name(options.device)}; {versions()}\n{setting}"
    _plot(results, bandwidth, stem.with_suffix(".png"), title)
    print(f"written: {stem.name}.md, .json, .png in {options.output}")


if __name__ == "__main__":
    main()
