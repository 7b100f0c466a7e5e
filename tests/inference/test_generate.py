"""Decoding with the latent cache, compared with the plain forward pass."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import generate_sharded
import pytest
import torch
from processes import run_in_processes
from small_models import build_model
from tokenizer_kinds import KINDS
from torch import Tensor

import titan_peer.model
from titan_peer.common.errors import UserError
from titan_peer.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from titan_peer.inference.decoder import Decoder, Form
from titan_peer.inference.generator import Generator, SamplingParams, _Sequence
from titan_peer.inference.latent_cache import BLOCK_SIZE, CacheBatch, cache_bytes_per_token
from titan_peer.model import Transformer
from titan_peer.ops import product_key_retrieve

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)


YARN = {"mla__rope_factor": 8.0, "mla__original_seq_len": 64, "mla__mscale": 0.7, "mla__mscale_all_dim": 1.2}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "yarn": YARN,
    "low-rank queries, shared experts": {"mla__q_lora_rank": 24, "peer__share_experts": True, "tie_embeddings": True},
    "rms, large values": {"peer__query_norm": "rms", "mla__v_head_dim": 48, **YARN},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(ROOT / "assets/tokenizer"))


def run_cached(
    model: Transformer, rows: Sequence[Tensor], chunks: Sequence[Sequence[int]], form: Form | None
) -> list[Tensor]:
    """Logits of every position of every row. Rows run together in pieces; piece i has chunks[i][b] tokens of row b."""
    decoder = Decoder(model, compile=False)
    cache = decoder.new_cache(sum(-(-len(row) // BLOCK_SIZE) for row in rows))
    cache_blocks = [cache.reserve(len(row)) for row in reversed(rows)][::-1]
    batch, done = CacheBatch(cache_blocks, [0] * len(rows), torch.device("cpu")), [0] * len(rows)
    found: list[list[Tensor]] = [[] for _ in rows]
    for counts in chunks:
        tokens = torch.randint(model.args.vocab_size, (len(rows), max(counts)))  # padding may have any value
        for b, count in enumerate(counts):
            tokens[b, :count] = rows[b][done[b] : done[b] + count]
        hidden = decoder(tokens, batch.step(counts), cache, form)
        for b, count in enumerate(counts):
            found[b].append(model.output(hidden[b, :count]))
            done[b] += count
    assert done == [len(row) for row in rows]
    return [torch.cat(parts) for parts in found]


def least_margin(model: Transformer, row: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """The smallest difference between the score of the last expert that a head chooses and that of the next one."""
    margins = []

    def retrieve(queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
        scores, indices = product_key_retrieve(queries, sub_keys, k + 1)
        margins.append((scores[..., -2] - scores[..., -1]).min().item())
        return scores[..., :-1], indices[..., :-1]

    with monkeypatch.context() as patch:
        patch.setattr(titan_peer.model, "product_key_retrieve", retrieve)
        model(row[None])
    return min(margins)


def rows_without_ties(model: Transformer, lengths: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Random rows in which the k-th expert and the next one never have scores that are equal up to rounding."""
    rows: list[Tensor] = []
    while len(rows) < len(lengths):
        row = torch.randint(model.args.vocab_size, (lengths[len(rows)],))
        if least_margin(model, row, monkeypatch) > 1e-5:
            rows.append(row)
    return rows


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_200_cached_tokens_of_a_ragged_batch_have_the_logits_of_the_full_forward(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(300, **VARIANTS[variant])
    prompts = [1, 63, 64, 130]
    rows = rows_without_ties(model, [length + 200 for length in prompts], monkeypatch)
    expected = [model(row[None])[0] for row in rows]
    for actual, wanted in zip(run_cached(model, rows, [prompts, *[[1] * 4] * 200], None), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@torch.no_grad()
def test_either_form_of_attention_serves_pieces_of_any_length(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(300, **YARN)
    rows = rows_without_ties(model, (150, 90), monkeypatch)
    expected = [model(row[None])[0] for row in rows]
    chunks = [[70, 5], [0, 60], [1, 1], [64, 20], [15, 4]]
    for actual, wanted in zip(run_cached(model, rows, chunks, form), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def greedy_by_full_forwards(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_text_is_that_of_recomputing_the_prefix_whatever_else_is_in_the_batch(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size, **YARN)
    prompts = ["In the beginning", "def f(x):", "", "A much longer text. " * 12, "x"]
    generator = Generator(model, tokenizer, max_batch_size=2)  # so that requests wait and take the places of others
    params = [SamplingParams(max_new_tokens=n, temperature=0, ignore_eos=True) for n in (40, 9, 33, 40, 1)]
    for prompt, param, completion in zip(prompts, params, generator.generate(prompts, params)):
        ids = generator.encode(prompt)
        assert completion.token_ids == greedy_by_full_forwards(model, ids, param.max_new_tokens)
        assert completion.finish_reason == "length" and completion.prompt_tokens == len(ids)
        assert completion.text == tokenizer.decode([*ids, *completion.token_ids])[len(tokenizer.decode(ids)) :]


def test_long_prompts_are_prefilled_in_pieces_with_the_same_result(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(build_model(tokenizer.vocab_size), tokenizer)
    prompts = [list(range(10, 10 + length)) for length in (100, 199, 150)]
    whole = generator.generate(prompts, GREEDY)
    monkeypatch.setattr("titan_peer.inference.generator._PREFILL_TOKENS", 3 * BLOCK_SIZE)
    assert [c.token_ids for c in generator.generate(prompts, GREEDY)] == [c.token_ids for c in whole]


def test_a_seed_fixes_each_completion_independently_of_the_batch(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size)
    params = SamplingParams(max_new_tokens=30, temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=5)
    prompts = ["Once", "Once", "In the end of all things"]
    together = Generator(model, tokenizer).generate(prompts, params)
    in_turn = Generator(model, tokenizer, max_batch_size=1).generate(prompts, params)
    assert together[0].token_ids != together[1].token_ids
    assert [c.token_ids for c in together] == [c.token_ids for c in in_turn]
    unseeded = SamplingParams(max_new_tokens=30)
    assert Generator(model, tokenizer).generate(["Once"], unseeded) != together[:1]


def test_logprobs_are_the_models_own_whatever_the_sampling(tokenizer: Tokenizer) -> None:
    generator = Generator(build_model(tokenizer.vocab_size), tokenizer)
    params = SamplingParams(
        max_new_tokens=12, temperature=0.5, top_k=50, repetition_penalty=1.3, seed=1, ignore_eos=True
    )
    prompt = generator.encode("The quick brown")
    (completion,) = generator.generate([prompt], params)
    (scored,) = generator.log_likelihoods([(prompt, completion.token_ids)])
    assert sum(completion.logprobs) == pytest.approx(scored.sum_logprob, abs=1e-4)


def test_the_mode_and_gradient_setting_of_the_model_are_left_alone(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size).train()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pieces = Generator(model, tokenizer).stream(["a"], SamplingParams(max_new_tokens=3))
    next(pieces)
    assert torch.is_grad_enabled()
    pieces.close()
    assert model.training
    assert all(torch.equal(statistics[name], buffer) for name, buffer in model.named_buffers())


# ---- stopping


@pytest.mark.parametrize("kind", ["llama 2", "byte-level BPE", "WordPiece"])
def test_a_completions_text_is_that_of_its_ids_at_once_and_ends_at_the_stop_string(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    generator = Generator(build_model(tokenizer.vocab_size), tokenizer)
    free = SamplingParams(max_new_tokens=60, temperature=2, ignore_eos=True, seed=1)
    before = tokenizer.decode(generator.encode("the quick"))
    for completion in generator.generate(["the quick"] * 5, free):
        assert before + completion.text == tokenizer.decode([*generator.encode("the quick"), *completion.token_ids])
    stop = completion.text[10:13]  # of the fifth
    stopped = generator.generate(["the quick"] * 5, dataclasses.replace(free, stop=(stop,)))[-1]
    assert stopped.text == completion.text.split(stop)[0] and stopped.finish_reason == "stop"


def test_a_stop_string_that_only_the_end_makes_certain_is_the_reason_of_the_end() -> None:
    sequence = _Sequence(0, [65], SamplingParams(stop=("\ufffd",)), ByteTokenizer(), limit=2)
    assert sequence.push(66, 0.0).completion is None
    piece = sequence.push(0xE6, 0.0)
    assert piece.completion is not None and piece.completion.finish_reason == "stop" and piece.completion.text == "B"


def test_the_end_token_ends_a_completion_unless_ignored(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size)
    prompt = "The"
    (free,) = Generator(model, tokenizer).generate([prompt], GREEDY)
    place = 7
    with torch.no_grad():  # the head now prefers the end token in place of that token
        assert tokenizer.eos_id is not None
        model.output.weight[tokenizer.eos_id] = model.output.weight[free.token_ids[place]] * 1.01
    first = free.token_ids.index(free.token_ids[place])
    (ended,) = Generator(model, tokenizer).generate([prompt], SamplingParams(max_new_tokens=40, temperature=0))
    assert ended.finish_reason == "eos" and ended.token_ids == [*free.token_ids[:first], tokenizer.eos_id]
    assert free.text.startswith(ended.text)
    (ignored,) = Generator(model, tokenizer).generate([prompt], GREEDY)
    assert len(ignored.token_ids) == 40


def test_the_context_ends_a_completion(tokenizer: Tokenizer) -> None:
    generator = Generator(build_model(tokenizer.vocab_size, max_seq_len=64), tokenizer)
    (completion,) = generator.generate([[5] * 60], SamplingParams(max_new_tokens=100, temperature=0, ignore_eos=True))
    assert completion.finish_reason == "length" and len(completion.token_ids) == 4
    with pytest.raises(UserError, match="prompt 0 has 64 tokens: must be fewer than the model's context of 64"):
        generator.generate([[5] * 64])


# ---- log-likelihoods


def test_log_likelihoods_equal_those_of_one_forward_pass_a_pair(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size)
    generator = Generator(model, tokenizer)
    pairs = [("The capital of France is", " Paris"), ("", "Hello there"), ("2 + 2 =", " 4"), ("A" * 50, "B" * 30)]
    results = generator.log_likelihoods(pairs, batch_size=3)
    for (context, continuation), result in zip(pairs, results):
        ids = generator.encode(context + continuation)
        n = len(ids) - len(generator.encode(context))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)[-n:]
        wanted = logprobs.gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()
        assert result.sum_logprob == pytest.approx(wanted, abs=1e-4)
        assert result.num_tokens == n
        assert result.is_greedy == (logprobs.argmax(-1).tolist() == ids[-n:])


def test_greedy_continuations_are_called_greedy(tokenizer: Tokenizer) -> None:
    generator = Generator(build_model(tokenizer.vocab_size), tokenizer)
    prompt = generator.encode("Some words")
    (completion,) = generator.generate([prompt], GREEDY)
    other = [*completion.token_ids[:-1], (completion.token_ids[-1] + 1) % 4096]
    results = generator.log_likelihoods([(prompt, completion.token_ids), (prompt, other)])
    assert [r.is_greedy for r in results] == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size, max_seq_len=64)
    generator, ids = Generator(model, tokenizer), torch.randint(4096, (100,)).tolist()
    (result,) = generator.log_likelihoods([(ids[:90], ids[90:])])
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[-65:-1]]))[0].log_softmax(-1)
    wanted = logprobs[-10:].gather(1, torch.tensor(ids[90:])[:, None]).sum().item()
    assert result.sum_logprob == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(UserError, match="continuation 0 has 70 tokens: must be at most the model's context of 64"):
        generator.log_likelihoods([(ids[:30], ids[30:])])


# ---- a vocabulary larger than the tokenizer


@pytest.fixture(params=["beyond the tokenizer's", "between the tokenizer's"])
def ids_without_text(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, Tokenizer, list[int]]:
    """A model that prefers ids without an entry in its tokenizer, the tokenizer, and the ids of its entries."""
    tokenizer: Tokenizer = ByteTokenizer()
    known = list(range(258))
    if request.param == "between the tokenizer's":
        library = KINDS["WordLevel"]()
        library.save(str(tmp_path / "tokenizer.json"))
        tokenizer, known = load_tokenizer(str(tmp_path)), sorted(library.get_vocab().values())
    model = build_model(300)
    with torch.no_grad():
        states = torch.cat([model.output.weight[known].mean(dim=0, keepdim=True), model.output.weight[known]])
        for i in set(range(300)) - set(known):
            model.output.weight[i] = 3 * states[i % len(states)]
    return model, tokenizer, known


def logprobs_of_entries(model: Transformer, known: list[int], ids: list[int]) -> Tensor:
    """float32 [len(ids) - 1, 300], of the tokens after the first: a softmax over the entries only."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :-1]
    logprobs = torch.full_like(logits, float("-inf"))
    logprobs[:, known] = logits[:, known].log_softmax(-1)
    return logprobs


def test_ids_without_text_are_never_drawn(ids_without_text: tuple[Transformer, Tokenizer, list[int]]) -> None:
    model, tokenizer, known = ids_without_text
    generator, prompt = Generator(model, tokenizer), known[:5]
    with torch.no_grad():
        assert int(model(torch.tensor([prompt]))[0, -1].argmax()) not in known
    free = {"max_new_tokens": 30, "ignore_eos": True, "seed": 2}
    for params in (
        SamplingParams(**free, temperature=0),
        SamplingParams(**free, temperature=2),
        SamplingParams(**free, top_k=3, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    ):
        (completion,) = generator.generate([prompt], params)
        assert len(completion.token_ids) == 30 and set(completion.token_ids) <= set(known)
        wanted = logprobs_of_entries(model, known, [*prompt, *completion.token_ids])[4:]
        wanted = wanted.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=1e-4, atol=1e-4)


def test_ids_without_text_have_no_likelihood(ids_without_text: tuple[Transformer, Tokenizer, list[int]]) -> None:
    model, tokenizer, known = ids_without_text
    generator, context = Generator(model, tokenizer), known[:5]
    (greedy,) = generator.generate([context], SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True))
    for continuation in (greedy.token_ids, known[3:9]):
        (found,) = generator.log_likelihoods([(context, continuation)])
        wanted = logprobs_of_entries(model, known, [*context, *continuation])[4:]
        assert found.sum_logprob == pytest.approx(
            wanted.gather(1, torch.tensor(continuation)[:, None]).sum().item(), abs=1e-3
        )
        assert found.is_greedy == (continuation == greedy.token_ids)
    nobody = next(i for i in range(300) if i not in known)
    for call in (lambda: generator.generate([[nobody]]), lambda: generator.log_likelihoods([(context, [nobody])])):
        with pytest.raises(UserError, match=f"token {nobody} of (prompt|pair) 0: "):
            call()


# ---- memory


def test_the_cache_holds_the_latent_and_the_rope_part_only() -> None:
    model = build_model(50)
    assert cache_bytes_per_token(model.args, torch.bfloat16) == 3 * (32 + 8) * 2
    cache = Decoder(model, compile=False).new_cache(10)
    stored = sum(layer[1:].nbytes for layer in cache.layers)
    assert stored == 10 * BLOCK_SIZE * cache_bytes_per_token(model.args, torch.float32)


def test_blocks_come_back_when_sequences_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, caches = Generator(build_model(tokenizer.vocab_size), tokenizer, max_batch_size=3), []
    new_cache = generator.decoder.new_cache
    monkeypatch.setattr(generator.decoder, "new_cache", lambda n: caches.append((n, new_cache(n))) or caches[0][1])
    params = [SamplingParams(max_new_tokens=n, temperature=0, ignore_eos=True) for n in (1, 70, 5, 130, 2, 1, 90)]
    generator.generate(["word " * 5] * 7, params)
    ((num_blocks, cache),) = caches
    assert num_blocks == 3 + 2 + 2  # the three that need the most
    assert cache.free_blocks == num_blocks


# ---- on other devices, compiled, sharded


def test_the_compiled_decode_step_gives_the_same_text_without_compiling_for_every_length(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer.vocab_size, **YARN)
    prompts = [list(range(10, 10 + length)) for length in (40, 120)]  # both continue into a new block of the cache
    wanted = Generator(model, tokenizer).generate(prompts, GREEDY)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = Generator(model, tokenizer, compile=True).generate(prompts, GREEDY)
    assert [c.token_ids for c in compiled] == [c.token_ids for c in wanted]
    assert not counters["graph_break"]
    # blocks with and without experts, for one length of the cache and then for any
    assert 2 <= counters["stats"]["unique_graphs"] <= 4


def test_two_processes_with_sharded_weights_and_experts_write_what_one_writes(tmp_path: Path) -> None:
    job = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable", "false"]
    job += [
        "--training.mixed_precision_param",
        "float32",
        "--validation.enable",
        "false",
        "--model.n_dense_layers",
        "1",
    ]
    job += ["--checkpoint.enable", "false", "--model.init_std", "0.1", "--job.dump_folder", str(tmp_path / "run")]
    prompts = ["In the beginning", "def f(x):", "A longer text, " * 10]

    def run(processes: int, *more: str) -> dict[str, list[object]]:
        output = tmp_path / f"{processes}.json"
        run_in_processes(processes, generate_sharded.main, output, prompts, [*job, *more])
        return json.loads(output.read_text(encoding="utf-8"))

    one, two = run(1), run(2, "--parallelism.expert_parallel_degree", "2")
    assert two["token_ids"] == one["token_ids"]
    assert two["sum_logprobs"] == pytest.approx(one["sum_logprobs"], rel=1e-5)


# ---- a million experts


@pytest.mark.slow
def test_a_million_experts_decode_from_the_file_in_little_memory(tmp_path: Path) -> None:
    job = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable", "false"]
    job += ["--model.n_layers", "1", "--model.dim", "64", "--model.peer.num_experts", str(1024**2)]
    job += ["--model.peer.product_key_dim", "1024", "1024", "--optimizer.expert_second_moment", "row"]
    job += ["--training.steps", "1", "--training.local_batch_size", "1", "--validation.enable", "false"]
    started = [sys.executable, "-m", "titan_peer.train", *job, "--job.dump_folder", str(tmp_path)]
    done = subprocess.run(started, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    words = ["generate", "--checkpoint", str(tmp_path / "checkpoint/step-1"), "--prompt", "In the beginning"]
    words += ["--seed", "1", "--json", "--max-new-tokens"]
    code = "import sys; from titan_peer.commands import main as cli; from titan_peer.common import host_memory; assert cli.main(sys.argv[1:]) == 0; "
    code += "print(host_memory.peak_resident_bytes())"

    def run(tokens: int, tables: str) -> tuple[str, float]:
        """The completion and the process's peak memory in MB."""
        done = subprocess.run(
            [sys.executable, "-c", code, *words, str(tokens), "--tables", tables],
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        )
        completion, peak = done.stdout.splitlines()
        return completion, int(peak) / 1e6

    assert run(20, "mapped")[0] == run(20, "device")[0]
    # Memory after one token: around each row that is read the system maps 64 KiB that lie in its file cache anyway, and
    # counts them for the process until it needs the memory.
    mapped_mb, loaded_mb = run(1, "mapped")[1], run(1, "device")[1]
    tables_mb = 2 * 1024**2 * 64 * 4 / 1e6  # 537
    assert loaded_mb - mapped_mb > 0.9 * tables_mb


def test_several_completions_are_told_apart_beside_the_output(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titan_peer.commands.generate import write

    monkeypatch.setattr(logging.getLogger("titan_peer"), "propagate", True)
    generator, params = Generator(build_model(vocab_size=258), ByteTokenizer()), dataclasses.replace(GREEDY, seed=1)
    for prompts in (["one"], ["one", 'two "lines"']):
        caplog.clear()
        with caplog.at_level(logging.INFO, "titan_peer"):
            write(generator, prompts, params, as_json=False)
        said = [record.message for record in caplog.records if record.message.startswith("---")]
        assert said == (['--- 1 of 2, after "one"', '--- 2 of 2, after "two \\"lines\\""'] if len(prompts) > 1 else [])
        texts = [c.text for c in generator.generate(prompts, params)]
        assert capsys.readouterr().out == "".join(text + "\n" for text in texts)
