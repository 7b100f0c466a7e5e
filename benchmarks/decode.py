"""Decoding: speed and memory of the latent cache at several context lengths, and the time per token with a million
experts.

The first part compares three ways to compute the same next token with the same weights: the paged latent cache with
absorbed attention, a plain cache of every head's keys and values, and no cache (the whole prefix runs again). The
second part compares decode steps of models that differ only in their experts: their number, and how it is divided into
sub-keys. Weights are random, because the speed does not depend on them.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import markdown_table, median_ms, synchronize, write_results
from torch import Tensor, nn

from titan_peer.common.command_line import FlagParser
from titan_peer.common.host_memory import prefer_huge_pages
from titan_peer.inference.decoder import Decoder
from titan_peer.inference.latent_cache import CacheBatch, cache_bytes_per_token
from titan_peer.model import PEER as PEERLayer
from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer

CONTEXTS = (128, 2048, 8192)
WARMUP, REPEATS, ROUNDS = 5, 40, 3
EXPERTS_DIM = 256  # model dim where the number of experts is compared: tables of a million rows take 2 GiB
MLA = MLAArgs(n_heads=16, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
PEER = PEERArgs(num_experts=16384, product_key_dim=[128, 128], num_heads=8, num_experts_per_tok=16, query_dim=128)
MODEL = ModelArgs(vocab_size=4096, dim=512, n_layers=4, ffn_hidden_dim=1536, max_seq_len=8448, mla=MLA, peer=PEER)


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def build(args: ModelArgs, device: str, dtype: torch.dtype, tables: nn.Module | None = None) -> Transformer:
    """A model with random weights, and with `tables` as its shared expert tables if they are given."""
    with torch.device("meta"):
        model = Transformer(args)
    shared, model.shared_experts = model.shared_experts, None
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
        if shared is not None and tables is None:
            shared.to_empty(device=device)
            # random rows, repeated: drawing every number of a million experts takes too long
            for table in shared.parameters():
                prefer_huge_pages(table)  # as for the tables of a loaded checkpoint
                rows = torch.randn(16384, *table.shape[1:], device=device) * table.shape[-1] ** -0.5
                for part in table.split(16384):
                    part.copy_(rows)
    model.shared_experts = tables or shared
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


class LatentDecoding:
    """Decode steps at a fixed context: every call decodes the token after `context` others."""

    def __init__(self, model: Transformer, context: int, batch_size: int, *, compile: bool) -> None:
        self.decoder = Decoder(model, compile=compile)
        blocks = [list(range(1, 1 + -(-(context + 1) // 64)))] * batch_size
        self.cache = self.decoder.new_cache(batch_size * len(blocks[0]))
        self.blocks = [[b + i * len(own) for b in own] for i, own in enumerate(blocks)]
        for pool in self.cache.layers:
            pool.normal_()
        self.context, self.batch_size = context, batch_size
        # different tokens in every call, so that the rows they retrieve are not in the processor's cache
        self.tokens = torch.randint(model.args.vocab_size, (64, batch_size, 1), device=self.decoder.device)

    def __call__(self, i: int = 0) -> Tensor:
        batch = CacheBatch(self.blocks, [self.context] * self.batch_size, self.decoder.device)
        hidden = self.decoder(self.tokens[i % len(self.tokens)], batch.step([1] * self.batch_size), self.cache)
        return self.decoder.model.output(hidden[:, 0]).argmax(-1)


class PlainCacheDecoding:
    """The same steps with the keys and values of every head in contiguous tensors, as multi-head attention caches
    them."""

    def __init__(self, model: Transformer, context: int, batch_size: int) -> None:
        self.model, self.context = model, context
        mla, device = model.args.mla, model.tok_embeddings.weight.device
        shape = (batch_size, mla.n_heads, context + 1)
        dtype = model.tok_embeddings.weight.dtype
        self.keys = [torch.randn(*shape, mla.qk_head_dim, device=device, dtype=dtype) for _ in model.layers]
        self.values = [torch.randn(*shape, mla.v_head_dim, device=device, dtype=dtype) for _ in model.layers]
        self.tokens = torch.randint(model.args.vocab_size, (64, batch_size, 1), device=device)

    def __call__(self, i: int = 0) -> Tensor:
        x, rope = (
            self.model.tok_embeddings(self.tokens[i % len(self.tokens)]),
            self.model.rope[None, self.context : self.context + 1],
        )
        for block, keys, values in zip(self.model.layers, self.keys, self.values):
            mla, h = block.attention, block.attention_norm(x)
            q = torch.cat(mla.queries(h, rope), dim=-1).transpose(1, 2)
            k, v = mla.expand(*mla.latents(h, rope))
            keys[:, :, -1:], values[:, :, -1:] = k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, keys, values, scale=mla.softmax_scale)
            x = block.after_attention(x + mla.wo(out.transpose(1, 2).flatten(2)), self.model.shared_experts)
        return self.model.output(self.model.norm(x)[:, 0]).argmax(-1)


def ms_within(
    modules: Sequence[nn.Module], method: str, step: Callable[[int], object], device: str, repeats: int
) -> float:
    """Median milliseconds per step that are spent in a method of these modules, summed over the modules."""
    spent = 0.0

    def timed(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: object) -> Tensor:
            nonlocal spent
            synchronize(device)
            start = time.perf_counter()
            out = inner(*arguments)
            synchronize(device)
            spent += time.perf_counter() - start
            return out

        return run

    originals = [getattr(module, method) for module in modules]
    for module, inner in zip(modules, originals):
        setattr(module, method, timed(inner))
    times = []
    for i in range(WARMUP + repeats):
        spent = 0.0
        step(i)
        times.append(spent * 1e3)
    for module, inner in zip(modules, originals):
        setattr(module, method, inner)
    return statistics.median(times[WARMUP:])


def by_context(device: str, dtype: torch.dtype, compile: bool, recompute: bool) -> tuple[str, list[dict[str, float]]]:
    model, rows, records = build(MODEL, device, dtype), [], []
    for context in CONTEXTS:
        say(f"context {context}")
        latent = LatentDecoding(model, context, 1, compile=compile)
        plain = PlainCacheDecoding(model, context, 1)
        latent_ms = median_ms(latent, device, REPEATS, WARMUP)
        rest_ms = ms_within(model.layers, "after_attention", latent, device, REPEATS) if not compile else math.nan
        plain_ms = median_ms(plain, device, REPEATS, WARMUP)
        whole_ms = math.nan
        if recompute:
            tokens = torch.randint(MODEL.vocab_size, (1, context + 1), device=device)

            def again(_: int, tokens: Tensor = tokens, decoder: Decoder = latent.decoder) -> Tensor:
                return model.output(decoder.whole(tokens)[:, -1]).argmax(-1)

            whole_ms = median_ms(again, device, repeats=3 if context < 4096 else 1, warmup=1 if context < 4096 else 0)
        times = {"latent": latent_ms, "rest": rest_ms, "plain": plain_ms, "whole": whole_ms}
        records.append({"context": context, **times})
        speeds = [f"{1e3 / ms:.4g}" for ms in (latent_ms, plain_ms, whole_ms)]
        rows.append([f"{context:,}", f"{latent_ms:.2f}", f"{rest_ms:.2f}", *speeds, f"{whole_ms / latent_ms:,.0f} x"])
    header = ["context", "ms per token", "PEER and feed-forward, ms", "tokens/s", "tokens/s with a plain cache"]
    header += ["tokens/s without a cache", "speed-up over no cache"]
    return markdown_table(header, rows), records


def cache_sizes() -> tuple[str, list[dict[str, object]]]:
    deepseek = ModelArgs(
        vocab_size=1,
        n_layers=27,
        mla=MLAArgs(n_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    )
    rows, records = [], []
    for name, args in (("this benchmark's model", MODEL), ("DeepSeek-V2-Lite's attention", deepseek)):
        ours = cache_bytes_per_token(args, torch.bfloat16)
        mha = args.n_layers * args.mla.n_heads * (args.mla.qk_head_dim + args.mla.v_head_dim) * 2
        rows.append([name, f"{ours:,}", f"{mha:,}", f"{mha / ours:.1f} x"])
        records.append({"model": name, "latent_bytes": ours, "mha_bytes": mha})
    header = ["bytes per token, all layers, bfloat16", "latent cache", "MHA of the same heads", "smaller by"]
    return markdown_table(header, rows), records


class ExpertCount(NamedTuple):
    """A PEER layer of the comparison."""

    axes: list[int]
    keys_per_head: bool = True
    query_dim: int = PEER.query_dim

    @property
    def name(self) -> str:
        shared = "" if self.keys_per_head else ", shared"
        query = "" if self.query_dim == PEER.query_dim else f", query dim {self.query_dim}"
        return f"{math.prod(self.axes):,} as {' x '.join(map(str, self.axes))}{shared}{query}"


BASE = ExpertCount([128, 128])
COMPARED = [BASE, ExpertCount([1024, 1024]), ExpertCount([1024, 1024], keys_per_head=False)]
# the query is divided evenly between the axes: 128 is not a multiple of three
COMPARED += [ExpertCount([128, 128, 64], query_dim=144), ExpertCount([32] * 4)]


def by_experts(
    device: str, dtype: torch.dtype, compile: bool, batch_sizes: Sequence[int]
) -> tuple[str, list[dict[str, Any]]]:
    """Decode steps of models that differ only in the number of experts and in their sub-keys; the models alternate."""
    rows, records = [], []
    tables: dict[int, nn.Module] = {}
    models = []
    for count in COMPARED:
        num_experts = math.prod(count.axes)
        retrieval = {"product_key_dim": count.axes, "keys_per_head": count.keys_per_head, "query_dim": count.query_dim}
        peer = replace(PEER, num_experts=num_experts, **retrieval)
        args = replace(MODEL, dim=EXPERTS_DIM, peer=replace(peer, share_experts=True))
        models.append(build(args, device, dtype, tables.get(num_experts)))
        tables[num_experts] = models[-1].shared_experts
    for batch_size in batch_sizes:
        say(f"batch {batch_size}")
        step_ms: list[list[float]] = [[] for _ in models]
        peer_ms: list[list[float]] = [[] for _ in models]
        steps = [LatentDecoding(model, 128, batch_size, compile=compile) for model in models]
        for _ in range(ROUNDS):
            for which, (model, step) in enumerate(zip(models, steps)):
                step_ms[which].append(median_ms(step, device, REPEATS // 2, WARMUP))
                if not compile:
                    layers = [module for module in model.modules() if isinstance(module, PEERLayer)]
                    peer_ms[which].append(ms_within(layers, "forward", step, device, REPEATS // 2) / len(layers))
        for which, count in enumerate(COMPARED):
            row: list[object] = [batch_size, count.name]
            for times in (step_ms, peer_ms)[: 1 if compile else 2]:
                base, own = statistics.median(times[0]), statistics.median(times[which])
                row += [f"{own:.2f}", f"{100 * (own / base - 1):+.0f}%" if which else ""]
            rows.append(row)
            records.append(
                {"batch": batch_size, **count._asdict(), "step_ms": step_ms[which], "layer_ms": peer_ms[which]}
            )
    header = ["batch", "experts, by sub-keys of each axis", "ms per step", f"against {math.prod(BASE.axes):,}"]
    if not compile:
        header += ["ms per PEER layer", f"against {math.prod(BASE.axes):,}"]
    return markdown_table(header, rows), records


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--no_recompute", action="store_true", help="leave out the slow way, without a cache")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 16], help="batch sizes for the comparison of expert counts"
    )
    parser.add_argument("--only", choices=["contexts", "experts"], help="one of the two parts")
    parser.add_argument("--output", type=Path, help="folder for the results instead of benchmarks/results")
    args = parser.parse_args()
    auto = torch.bfloat16 if args.device == "cuda" else torch.float32
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    setting = (
        f"{str(dtype).removeprefix('torch.')}, decode step {'compiled' if args.compile else 'not compiled'}. "
        f"Model: {MODEL.n_layers} blocks, {MLA.n_heads} heads, latent {MLA.kv_lora_rank} + {MLA.qk_rope_head_dim}, 3 layers of "
        f"{PEER.num_heads} x {PEER.num_experts_per_tok} experts per token"
    )
    folder = {"folder": args.output} if args.output else {}
    with torch.no_grad():
        if args.only != "experts":
            sizes, size_records = cache_sizes()
            table, records = by_context(args.device, dtype, args.compile, not args.no_recompute)
            text = f"{setting}, dim {MODEL.dim}, one sequence.\n\n{table}\n\n{sizes}"
            data = {"contexts": records, "sizes": size_records, "compile": args.compile}
            print(
                write_results("decode-contexts", args.device, text, data, **folder)
                .with_suffix(".md")
                .read_text(encoding="utf-8")
            )
        if args.only != "contexts":
            table, records = by_experts(args.device, dtype, args.compile, args.batch_sizes)
            text = f"{setting}, dim {EXPERTS_DIM}, context 128.\n\n{table}"
            data = {"experts": records, "compile": args.compile}
            print(
                write_results("decode-experts", args.device, text, data, **folder)
                .with_suffix(".md")
                .read_text(encoding="utf-8")
            )


if __name__ == "__main__":
    main()
