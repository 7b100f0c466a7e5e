"""Generation and training while other programs use the cores, under several settings of OpenMP's waiting threads.

A thread that has finished its part of a loop waits for the others. By default it spins. If the system has taken a core
from one of the threads, the others spin until that thread runs again, and this can happen in each of the thousands of
short loops per second. The settings take turns, each in a separate process: without other load, and beside processes
that each keep one core busy.

    python benchmarks/busy_cores.py --rounds 3
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from titan_peer.common.command_line import FlagParser

# the only variables of OpenMP that are set before torch is loaded
SETTINGS: dict[str, dict[str, str]] = {
    "as libraries come": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
Found = dict[tuple[str, str, int], list[float]]
"""(setting, work, number of busy processes): milliseconds of each round."""
TOKENS, STEPS, WARMUP = 60, 5, 1


def measure() -> dict[str, float]:
    """Milliseconds per generated token and per training step of a model of the debug job's size, in this process."""
    import torch

    from titan_peer.data.tokenizer import ByteTokenizer
    from titan_peer.inference.generator import Generator, SamplingParams
    from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer

    torch.manual_seed(0)
    mla = MLAArgs(n_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    peer = PEERArgs(num_experts=16384, product_key_dim=[128, 128], num_heads=4, num_experts_per_tok=16, query_dim=64)
    model = Transformer(
        ModelArgs(vocab_size=4096, dim=256, n_layers=3, ffn_hidden_dim=768, max_seq_len=512, mla=mla, peer=peer)
    )
    with torch.no_grad():
        model.init_weights()

    generator = Generator(model, ByteTokenizer())
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
    generator.generate(["warm up"], SamplingParams(max_new_tokens=5, ignore_eos=True))
    start = time.perf_counter()
    generator.generate(["In the beginning"], params)
    per_token = (time.perf_counter() - start) * 1e3 / TOKENS

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(4096, (4, 256))
    times = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        (model(tokens, None, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.perf_counter() - start) * 1e3)
    return {"generate": per_token, "train": statistics.median(times[WARMUP:])}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run this many processes that each keep one core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(settings: dict[str, str]) -> dict[str, float]:
    chosen = ("OMP_", "GOMP_", "KMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    done = subprocess.run(
        [sys.executable, __file__, "--child"],
        env=environment | settings,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(args: Sequence[str] | None = None) -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="times that every setting is measured (default %(default)s)"
    )
    parser.add_argument(
        "--others", type=int, nargs="+", metavar="N", help="numbers of busy processes (default: 0, and one per core)"
    )
    parser.add_argument("--child", action="store_true", help="measure in this process, print JSON")
    parser.add_argument("--note", default="", help="a sentence about the machine's state, for the table")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results beside this file)")
    options = parser.parse_args(args)
    if options.child:
        print(json.dumps(measure()))
        return
    beside = options.others or [0, len(os.sched_getaffinity(0))]
    found: Found = {}
    for number in range(options.rounds):
        for others in beside:
            with busy(others):
                for name, settings in SETTINGS.items():
                    for work, value in run(settings).items():
                        found.setdefault((name, work, others), []).append(value)
                        print(
                            f"round {number + 1}, {others} others, {name}: {work} {value:.1f} ms",
                            file=sys.stderr,
                            flush=True,
                        )

    from report import RESULTS, write_results

    text = f"Median (least to most) of {options.rounds} processes each, in turns. {options.note}\n\n{table(found, beside)}\n"
    data = {f"{name} / {work} / {others}": values for (name, work, others), values in found.items()}
    write_results("busy-cores", "cpu", text, data, options.output or RESULTS)


def table(found: Found, beside: Sequence[int]) -> str:
    from report import markdown_table

    columns = [(work, others) for others in beside for work in ("generate", "train")]
    header = ["setting"]
    for work, others in columns:
        what = "ms per token" if work == "generate" else "ms per step"
        header.append(
            f"{work}, {what}, {f'beside {others} busy processes' if others else 'no process started beside it'}"
        )
    rows = [[name, *(_spread(found[name, *column]) for column in columns)] for name in SETTINGS]
    return markdown_table(header, rows)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


if __name__ == "__main__":
    main()
