"""Decoding: what the latent cache costs and saves, at several context lengths, and what a million experts cost a token.

Three ways to the same next token, with the same weights: the paged latent cache with absorbed attention; a plain cache of
every head's keys and values; no cache, the whole prefix again. Then decode steps of models that differ only in the number of
experts. Random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from report import device_name, markdown_table, median_ms, synchronize, write_results
from torch import Tensor

from titan_peer import decoder as decoder_module
from titan_peer.decoder import Decoder
from titan_peer.latent_cache import CacheBatch, cache_bytes_per_token
from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer

CONTEXTS = (128, 2048, 8192)
MLA = MLAArgs(n_heads=16, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
PEER = PEERArgs(num_experts=16384, product_key_dim=[128, 128], num_heads=8, num_experts_per_tok=16, query_dim=128)
MODEL = ModelArgs(vocab_size=4096, dim=512, n_layers=4, ffn_hidden_dim=1536, max_seq_len=8448, mla=MLA, peer=PEER)


def build(args: ModelArgs, device: str, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(args)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


class LatentDecoding:
    """Decode steps at a fixed context: every call is the token after `context` others."""

    def __init__(self, model: Transformer, context: int, batch_size: int, *, compile: bool) -> None:
        self.decoder = Decoder(model, compile=compile)
        blocks = [list(range(1, 1 + -(-(context + 1) // 64)))] * batch_size
        self.cache = self.decoder.new_cache(batch_size * len(blocks[0]))
        self.blocks = [[b + i * len(own) for b in own] for i, own in enumerate(blocks)]
        for pool in self.cache.layers:
            pool.normal_()
        self.context, self.batch_size = context, batch_size
        self.tokens = torch.randint(model.args.vocab_size, (batch_size, 1), device=self.decoder.device)

    def __call__(self) -> Tensor:
        batch = CacheBatch(self.blocks, [self.context] * self.batch_size, self.decoder.device)
        hidden = self.decoder(self.tokens, batch.step([1] * self.batch_size), self.cache)
        return self.decoder.model.output(hidden[:, 0]).argmax(-1)


class PlainCacheDecoding:
    """The same with keys and values of every head in contiguous tensors: what multi-head attention would cache."""

    def __init__(self, model: Transformer, context: int, batch_size: int) -> None:
        self.model, self.context = model, context
        mla, device = model.args.mla, model.tok_embeddings.weight.device
        shape = (batch_size, mla.n_heads, context + 1)
        dtype = model.tok_embeddings.weight.dtype
        self.keys = [torch.randn(*shape, mla.qk_head_dim, device=device, dtype=dtype) for _ in model.layers]
        self.values = [torch.randn(*shape, mla.v_head_dim, device=device, dtype=dtype) for _ in model.layers]
        self.tokens = torch.randint(model.args.vocab_size, (batch_size, 1), device=device)

    def __call__(self) -> Tensor:
        x, rope = self.model.tok_embeddings(self.tokens), self.model.rope[None, self.context : self.context + 1]
        for block, keys, values in zip(self.model.layers, self.keys, self.values):
            mla, h = block.attention, block.attention_norm(x)
            q = torch.cat(mla.queries(h, rope), dim=-1).transpose(1, 2)
            k, v = mla.expand(*mla.latents(h, rope))
            keys[:, :, -1:], values[:, :, -1:] = k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, keys, values, scale=mla.softmax_scale)
            x = block.after_attention(x + mla.wo(out.transpose(1, 2).flatten(2)), self.model.shared_experts)
        return self.model.output(self.model.norm(x)[:, 0]).argmax(-1)


def attention_ms(step: Callable[[], object], device: str, repeats: int) -> float:
    """Milliseconds of one step spent in attention over the cache: scores, softmax, weighted sum, and gathering pages."""
    spent = 0.0
    inner = decoder_module._attention

    def timed(*arguments: object) -> Tensor:
        nonlocal spent
        synchronize(device)
        start = time.perf_counter()
        out = inner(*arguments)  # type: ignore[arg-type]
        synchronize(device)
        spent += time.perf_counter() - start
        return out

    decoder_module._attention = timed  # type: ignore[assignment]
    try:
        step()
        spent = 0.0
        for _ in range(repeats):
            step()
    finally:
        decoder_module._attention = inner
    return spent / repeats * 1e3


def by_context(device: str, dtype: torch.dtype, compile: bool, recompute: bool) -> tuple[str, list[dict[str, float]]]:
    model, rows, records = build(MODEL, device, dtype), [], []
    for context in CONTEXTS:
        latent = LatentDecoding(model, context, 1, compile=compile)
        plain = PlainCacheDecoding(model, context, 1)
        latent_ms = median_ms(lambda _, run=latent: run(), device, repeats=30)
        plain_ms = median_ms(lambda _, run=plain: run(), device, repeats=30)
        in_attention = attention_ms(latent, device, 10) if not compile else float("nan")
        whole_ms = float("nan")
        if recompute:
            tokens = torch.randint(MODEL.vocab_size, (1, context + 1), device=device)
            decoder = latent.decoder
            whole_ms = median_ms(
                lambda _, t=tokens, d=decoder: model.output(d.whole(t)[:, -1]), device, repeats=3 if context < 4096 else 1,
                warmup=1,
            )  # fmt: skip
        record = {
            "context": context,
            "latent_ms": latent_ms,
            "attention_ms": in_attention,
            "plain_ms": plain_ms,
            "recompute_ms": whole_ms,
        }
        records.append(record)
        rows.append(
            [
                f"{context:,}",
                f"{1e3 / latent_ms:.1f}",
                f"{latent_ms:.2f}",
                f"{in_attention:.2f}",
                f"{latent_ms - in_attention:.2f}",
                f"{1e3 / plain_ms:.1f}",
                f"{1e3 / whole_ms:.2f}",
                f"{whole_ms / latent_ms:,.0f} x",
            ]
        )
    header = ["context", "tokens/s, latent cache", "ms a token", "of it attention", "the rest"]
    header += ["tokens/s, plain MHA cache", "tokens/s, whole prefix again", "faster than that"]
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
    header = ["bytes a token, all layers, bfloat16", "latent cache", "MHA of the same heads", "smaller by"]
    return markdown_table(header, rows), records


def by_experts(
    device: str, dtype: torch.dtype, compile: bool, batch_sizes: tuple[int, ...]
) -> tuple[str, list[dict[str, object]]]:
    rows, records = [], []
    for keys_per_head in (True, False):
        for batch_size in batch_sizes:
            times = []
            for side in (128, 1024):
                peer = replace(PEER, num_experts=side**2, product_key_dim=[side, side], keys_per_head=keys_per_head)
                peer = replace(peer, share_experts=True)
                model = build(replace(MODEL, peer=peer), device, dtype)
                step = LatentDecoding(model, 128, batch_size, compile=compile)
                # other tokens every time, so that the rows they retrieve are not in the processor's cache
                inputs = torch.randint(MODEL.vocab_size, (40, batch_size, 1), device=device)

                def run(i: int, step: LatentDecoding = step, inputs: Tensor = inputs) -> None:
                    step.tokens = inputs[i % len(inputs)]
                    step()

                times.append(median_ms(run, device, repeats=30))
                del model, step
            ratio = times[1] / times[0]
            rows.append(
                [
                    "own" if keys_per_head else "shared",
                    batch_size,
                    *(f"{ms / batch_size:.3f}" for ms in times),
                    f"{100 * (ratio - 1):+.0f}%",
                ]
            )
            records.append({"keys_per_head": keys_per_head, "batch_size": batch_size, "ms": times})
    header = ["sub-keys of the heads", "batch", "ms a token, 16,384 experts", "1,048,576 experts", "difference"]
    return markdown_table(header, rows), records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--no-recompute", action="store_true", help="leave out the slow way: the whole prefix again")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 16], help="of the comparison of expert counts"
    )
    parser.add_argument("--output", type=Path, help="folder for the results instead of benchmarks/results")
    args = parser.parse_args()
    auto = torch.bfloat16 if args.device == "cuda" else torch.float32
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    with torch.no_grad():
        sizes, size_records = cache_sizes()
        contexts, context_records = by_context(args.device, dtype, args.compile, not args.no_recompute)
        experts, expert_records = by_experts(args.device, dtype, args.compile, tuple(args.batch_sizes))
    text = "\n\n".join(
        [
            f"{device_name(args.device)}, {str(dtype).removeprefix('torch.')}, "
            f"decode step {'compiled' if args.compile else 'not compiled'}. Model: dim {MODEL.dim}, {MODEL.n_layers} blocks, "
            f"{MLA.n_heads} heads, latent {MLA.kv_lora_rank} + {MLA.qk_rope_head_dim}, 3 layers of "
            f"{PEER.num_heads} x {PEER.num_experts_per_tok} experts a token.",
            "## Cache\n\n" + sizes,
            "## One sequence, by context\n\n" + contexts,
            "## By number of experts, context 128, whole decode step\n\n" + experts,
        ]
    )
    data = {"sizes": size_records, "contexts": context_records, "experts": expert_records, "compile": args.compile}
    folder = {"folder": args.output} if args.output else {}
    stem = write_results("decode", args.device, text, data, **folder)
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
