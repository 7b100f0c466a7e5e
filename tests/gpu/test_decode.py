"""Decoding on a GPU: the same text as on the CPU, tables that stay in the CPU's memory, FlashMLA against PyTorch."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from titan_peer.checkpoint.inference import move_all_but_tables
from titan_peer.data.tokenizer import ByteTokenizer
from titan_peer.inference.generator import Completion, Generator, SamplingParams
from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer
from titan_peer.ops.latent_attention import (
    attend_to_latents,
    flash_mla_attention,
    flash_mla_schedule,
    flash_mla_unavailable_reason,
)

DEVICE = torch.device("cuda")
GREEDY = SamplingParams(max_new_tokens=80, temperature=0, ignore_eos=True)
PROMPTS = ["In the beginning", "x", "A longer text than the others. " * 8]


def build(mla: MLAArgs) -> Transformer:
    peer = PEERArgs(num_experts=1024, product_key_dim=[32, 32], num_heads=2, num_experts_per_tok=8, query_dim=32)
    args = ModelArgs(vocab_size=258, dim=128, n_layers=3, max_seq_len=512, init_std=0.1, mla=mla, peer=peer)
    torch.manual_seed(0)
    model = Transformer(args)
    model.init_weights()
    return model.eval()


SMALL = MLAArgs(n_heads=4, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16, rope_factor=4.0)


def logprobs(completions: list[Completion]) -> torch.Tensor:
    return torch.tensor([completion.logprobs for completion in completions])


@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_gives_the_cpus_greedy_text(compile: bool) -> None:
    model = build(SMALL)
    wanted = Generator(model, ByteTokenizer()).generate(PROMPTS, GREEDY)
    actual = Generator(model.to(DEVICE), ByteTokenizer(), compile=compile).generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in actual] == [c.token_ids for c in wanted]
    torch.testing.assert_close(logprobs(actual), logprobs(wanted), rtol=1e-3, atol=1e-3)


def test_tables_stay_in_the_cpus_memory_when_the_model_is_on_the_gpu() -> None:
    model = build(SMALL)
    wanted = Generator(model, ByteTokenizer()).generate(PROMPTS, GREEDY)
    move_all_but_tables(model, DEVICE)
    tables = {name: p.device.type for name, p in model.named_parameters() if "expert_" in name}
    assert set(tables.values()) == {"cpu"} and model.output.weight.is_cuda
    actual = Generator(model, ByteTokenizer(), compile=False).generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in actual] == [c.token_ids for c in wanted]


def need_flash_mla() -> None:
    reason = flash_mla_unavailable_reason(DEVICE, torch.bfloat16, 512, 64)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("n_heads", [16, 64, 128])
def test_flash_mla_equals_attention_in_pytorch(n_heads: int) -> None:
    need_flash_mla()
    torch.manual_seed(0)
    lengths = torch.tensor([1, 64, 65, 700], dtype=torch.int32, device=DEVICE)
    table = torch.randperm(44, device=DEVICE).view(4, 11).int()
    pool = torch.randn(44, 64, 576, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(4, 1, n_heads, 576, device=DEVICE, dtype=torch.bfloat16)
    schedule = flash_mla_schedule(lengths, n_heads)
    actual = flash_mla_attention(q, pool, table, lengths, schedule, 576**-0.5)
    mask = (torch.arange(11 * 64, device=DEVICE) < lengths[:, None])[:, None, None]
    wanted = attend_to_latents(q.float(), pool[table].flatten(1, 2).float(), mask, 576**-0.5, 512)
    torch.testing.assert_close(actual.float(), wanted, rtol=2e-2, atol=2e-2)


def test_decoding_takes_flash_mla_where_it_fits_and_predicts_the_same() -> None:
    need_flash_mla()
    mla = MLAArgs(n_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    model = build(mla).to(DEVICE, torch.bfloat16)
    flash = Generator(model, ByteTokenizer(), compile=False)
    assert flash.decoder.report() == "decode attention: FlashMLA"
    completions = flash.generate(PROMPTS, GREEDY)
    pairs = [(flash.encode(prompt), c.token_ids) for prompt, c in zip(PROMPTS, completions)]
    scores = flash.log_likelihoods(pairs)  # by full forward passes, in PyTorch
    for completion, score in zip(completions, scores):
        assert sum(completion.logprobs) / 80 == pytest.approx(score.sum_logprob / 80, abs=2e-2)
