"""An exported model behaves in transformers as any causal language model does; the reference is titan_peer's own
model."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported_models import ROOT, TEXTS, VARIANTS, exported_in_shards, trained, trained_with
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompileConfig, StaticCache, TrainingArguments
from transformers import Trainer as TransformersTrainer

from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.inference.generator import Generator, SamplingParams
from titan_peer.model import QueryBatchNorm, Transformer
from titan_peer.ops import product_key_retrieve
from titan_peer.sharing.export import export_checkpoint

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_in_shards(variant, tmp_path_factory)


@pytest.fixture(scope="module")
def ours(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_model_for_inference(trained(variant, tmp_path_factory))[0]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """For tests that do not change the model."""
    return loaded(folder)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    return dict(
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")(
            TEXTS, return_tensors="pt", padding=True
        )
    )


@torch.no_grad()
def our_next_logits(ours: Transformer, tokens: Tensor, mask: Tensor, steps: int) -> Tensor:
    """The logits [B, steps, vocab] from which the last `steps` of tokens [B, S] were chosen, each row without its
    padding."""
    rows = []
    for row, length in zip(tokens, mask.sum(dim=1).tolist()):
        alone = row[-(length + steps) :]
        rows.append(ours(alone[None])[0, length - 1 : -1])
    return torch.stack(rows)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(0))


def test_logits_are_ours(ours: Transformer, theirs: Any) -> None:
    tokens = torch.randint(ours.args.vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), **EXACT)


def test_padding_on_either_side_changes_no_logit(theirs: Any) -> None:
    tokens, pad = random_tokens(1, 20), torch.zeros(1, 7, dtype=torch.long)
    with torch.no_grad():
        alone = theirs(tokens).logits
        for left in (True, False):
            mask = torch.cat([pad, torch.ones_like(tokens)] if left else [torch.ones_like(tokens), pad], dim=1)
            padded = theirs(torch.cat([pad, tokens] if left else [tokens, pad], dim=1), attention_mask=mask).logits
            torch.testing.assert_close(padded[:, 7:] if left else padded[:, :-7], alone, **EXACT)


def test_the_cache_holds_latents_only(theirs: Any) -> None:
    with torch.no_grad():
        cache = theirs(random_tokens(2, 10)).past_key_values
    mla, n_layers = theirs.config.mla, theirs.config.n_layers
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert numbers == 2 * 10 * n_layers * (mla["kv_lora_rank"] + mla["qk_rope_head_dim"])


# ---- generation


def test_greedy_text_is_our_generators(variant: str, folder: Path, theirs: Any, prompts: Any, tmp_path_factory) -> None:
    model, _, tokenizer = load_model_for_inference(trained(variant, tmp_path_factory))
    wanted = Generator(model, tokenizer).generate(TEXTS, SamplingParams(max_new_tokens=60, temperature=0))
    theirs_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    out = theirs.generate(**prompts, max_new_tokens=60, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    for row, completion in zip(out, wanted):
        ids = row[: len(completion.token_ids)]
        assert ids.tolist() == completion.token_ids
        assert theirs_tokenizer.decode(ids, skip_special_tokens=True) == completion.text


@pytest.mark.parametrize(
    "cache", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_every_step_of_generation_has_our_logits(ours: Transformer, theirs: Any, prompts: Any, cache: dict) -> None:
    out = theirs.generate(
        **prompts,
        max_new_tokens=25,
        min_new_tokens=25,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **cache,
    )
    wanted = our_next_logits(ours, out.sequences, prompts["attention_mask"], 25)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), wanted, **EXACT)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_either_name_and_takes_several_tokens_at_once(
    ours: Transformer, theirs: Any, name: str
) -> None:
    tokens, kept, logits = random_tokens(2, 40), {}, []
    with torch.no_grad():
        for part in tokens.split([20, 1, 1, 7, 11], dim=1):
            out = theirs(part, **kept)
            kept, logits = {name: out.past_key_values}, [*logits, out.logits]
        torch.testing.assert_close(torch.cat(logits, dim=1), ours(tokens), **EXACT)
        assert theirs(tokens, use_cache=False).past_key_values is None
        with pytest.raises(ValueError, match="two names of one thing"):
            theirs(tokens, cache=kept[name], past_key_values=StaticCache(theirs.config, max_cache_len=50))


def test_a_static_cache_takes_a_plain_mask_too(ours: Transformer, theirs: Any) -> None:
    tokens, mask = random_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    cache = StaticCache(theirs.config, max_cache_len=64)
    with torch.no_grad():
        parts = [theirs(tokens[:, :20], mask[:, :20], past_key_values=cache).logits]
        parts += [theirs(tokens[:, i : i + 1], mask[:, : i + 1], past_key_values=cache).logits for i in range(20, 30)]
        logits = torch.cat(parts, dim=1)
        torch.testing.assert_close(logits[:1, 5:], ours(tokens[:1, 5:]), **EXACT)
        torch.testing.assert_close(logits[1:], ours(tokens[1:]), **EXACT)


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
def test_a_static_cache_compiles_into_one_graph(ours: Transformer, theirs: Any, prompts: Any) -> None:
    settings = CompileConfig(backend="eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True  # as on a GPU
    torch._dynamo.utils.counters.clear()
    out = theirs.generate(
        **prompts,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        cache_implementation="static",
        compile_config=settings,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    wanted = our_next_logits(ours, out.sequences, prompts["attention_mask"], 6)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), wanted, **EXACT)


def test_transformers_has_nothing_to_complain_of(folder: Path, prompts: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    transformers.logging.enable_propagation()
    with caplog.at_level("WARNING", "transformers"):
        theirs = loaded(folder)
        theirs.generate(**prompts, max_new_tokens=3, do_sample=False)
        theirs.generate(**prompts, max_new_tokens=3, do_sample=False, cache_implementation="static")
        theirs.train()(prompts["input_ids"], labels=prompts["input_ids"]).loss.backward()
    transformers.logging.disable_propagation()
    assert caplog.text == ""


def test_beam_search_finds_sequences_of_the_probability_it_says(ours: Transformer, theirs: Any, prompts: Any) -> None:
    tokens, mask = prompts["input_ids"][:1], prompts["attention_mask"][:1]

    def search(**options: Any) -> Any:
        return theirs.generate(
            tokens,
            attention_mask=mask,
            num_beams=4,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            num_return_sequences=4,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )

    found, without_cache = search(), search(use_cache=False)
    assert torch.equal(found.sequences, without_cache.sequences)
    logits = our_next_logits(ours, found.sequences, mask.expand(4, -1), 8)
    logprobs = logits.log_softmax(dim=-1)
    wanted = logprobs.gather(2, found.sequences[:, -8:, None]).sum(dim=(1, 2)) / 8
    torch.testing.assert_close(found.sequences_scores, wanted, **EXACT)


def test_prompt_lookup_gives_the_greedy_text(ours: Transformer, theirs: Any) -> None:
    tokens = random_tokens(1, 12).repeat(1, 3)
    options = {
        "max_new_tokens": 30,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
        "no_repeat_ngram_size": 2,
    }
    greedy = theirs.generate(tokens, **options)
    assert len(set(greedy[0, 36:].tolist())) > 5  # not a text that a mistake would also give
    found = theirs.generate(
        tokens, prompt_lookup_num_tokens=4, output_logits=True, return_dict_in_generate=True, **options
    )
    assert torch.equal(found.sequences[:, :66], greedy)  # transformers 5.0 may go one token too far
    logits = torch.stack(found.logits, dim=1)
    wanted = our_next_logits(ours, found.sequences, torch.ones_like(tokens), found.sequences.shape[1] - 36)
    torch.testing.assert_close(logits, wanted, **EXACT)


def test_ids_without_text_are_never_generated(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "the": 1, "and": 4, "<s>": 7, "</s>": 9}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    settings = f"--model.tokenizer_path {tmp_path}/tokenizer.json --model.vocab_size 12 --training.steps 1"
    export_checkpoint(trained_with(settings, tmp_path / "run") / "step-1", tmp_path / "export")
    theirs = loaded(tmp_path / "export")
    assert theirs.config.vocab_size == 12
    out = theirs.generate(
        torch.tensor([[7, 1]] * 50),
        attention_mask=torch.ones(50, 2),
        max_new_tokens=5,
        do_sample=True,
        temperature=100.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert set(out.sequences.unique().tolist()) == set(vocabulary.values())
    without_text = [i for i in range(12) if i not in vocabulary.values()]
    assert all((scores[:, without_text] == float("-inf")).all() for scores in out.scores)


def test_generation_from_embeddings_gives_the_same_text(theirs: Any) -> None:
    tokens = random_tokens(2, 15)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    from_embeddings = theirs.generate(inputs_embeds=theirs.get_input_embeddings()(tokens), **options)
    assert torch.equal(from_embeddings, theirs.generate(tokens, **options)[:, 15:])


def test_more_tokens_than_the_context_are_refused(theirs: Any) -> None:
    limit = theirs.config.max_seq_len
    with pytest.raises(ValueError, match=r"1,500 tokens: the model's context ends at max_seq_len = 1,024"):
        theirs(random_tokens(1, 1500))
    with torch.no_grad():
        cache = theirs(random_tokens(1, limit)).past_key_values
        with pytest.raises(ValueError, match=r"1,025 tokens"):
            theirs(random_tokens(1, 1), past_key_values=cache)
        # padding has no position
        mask = torch.ones(1, limit + 6, dtype=torch.long)
        mask[:, :6] = 0
        assert theirs(random_tokens(1, limit + 6), attention_mask=mask).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"together may have 1,030 tokens.*max_seq_len = 1,024"):
        theirs.generate(random_tokens(1, 10), max_new_tokens=limit - 4)


def test_the_tokenizer_gives_our_ids(variant: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, _, ours = load_model_for_inference(trained(variant, tmp_path_factory))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode_batch([text])[0]]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_the_tokenizer_pads_and_knows_the_context(folder: Path, theirs: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.model_max_length == theirs.config.max_seq_len == 1024
    assert tokenizer.pad_token_id == theirs.config.pad_token_id == theirs.generation_config.pad_token_id
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, -1] == tokenizer.pad_token_id and batch["attention_mask"][0, -1] == 0


# ---- forward


def test_unknown_keywords_are_refused(theirs: Any) -> None:
    with pytest.raises(TypeError, match="attention_maks"):
        theirs(random_tokens(1, 5), attention_maks=torch.ones(1, 5))
    with pytest.raises(ValueError, match="attention_maks"):
        theirs.generate(random_tokens(1, 5), attention_maks=torch.ones(1, 5), max_new_tokens=2)
    with pytest.raises(ValueError, match="keeps no weights"):
        theirs(random_tokens(1, 5), output_attentions=True)
    with pytest.raises(ValueError, match="covers 3 tokens, but 0 are cached and 5 new"):
        theirs(random_tokens(1, 5), attention_mask=torch.ones(1, 3))


def test_hidden_states_are_the_embedding_and_every_blocks_output(ours: Transformer, theirs: Any) -> None:
    tokens, wanted = random_tokens(2, 20), []
    hooks = [block.register_forward_hook(lambda module, args, out: wanted.append(out)) for block in ours.layers]
    with torch.no_grad():
        logits = ours(tokens)
        out = theirs(tokens, output_hidden_states=True)
        wanted = [ours.embed(tokens), *wanted[:-1], ours.norm(wanted[-1])]
    for hook in hooks:
        hook.remove()
    assert len(out.hidden_states) == len(wanted) == theirs.config.num_hidden_layers + 1
    for theirs_after, ours_after in zip(out.hidden_states, wanted):
        torch.testing.assert_close(theirs_after, ours_after, **EXACT)
    torch.testing.assert_close(out.logits, logits, **EXACT)
    assert theirs(tokens).hidden_states is None


def test_a_tuple_is_returned_on_demand(theirs: Any) -> None:
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        out, parts = theirs(tokens, labels=tokens), theirs(tokens, labels=tokens, return_dict=False)
    assert isinstance(parts, tuple) and len(parts) == 3
    assert torch.equal(parts[0], out.loss) and torch.equal(parts[1], out.logits)


def test_embeddings_stand_for_tokens(theirs: Any) -> None:
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(inputs_embeds=theirs.get_input_embeddings()(tokens)).logits, theirs(tokens).logits, rtol=0, atol=0
        )
    for wrong in ({}, {"input_ids": tokens, "inputs_embeds": theirs.get_input_embeddings()(tokens)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            theirs(**wrong)


def test_positions_that_begin_anew_begin_another_document(ours: Transformer, theirs: Any) -> None:
    tokens = random_tokens(1, 24)
    positions = torch.cat([torch.arange(n) for n in (10, 3, 11)])[None]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor([10, 3, 11]))[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens, position_ids=positions).logits, ours(tokens, document_ids=documents), **EXACT
        )


def test_the_head_is_tied_as_in_training_and_both_embeddings_can_be_set(folder: Path, ours: Transformer) -> None:
    theirs = loaded(folder)
    tied = ours.args.tie_embeddings
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) == tied
    assert theirs.config.tie_word_embeddings == tied
    head, embedding = torch.nn.Linear(64, 7, bias=False), torch.nn.Embedding(7, 64)
    theirs.set_output_embeddings(head)
    theirs.set_input_embeddings(embedding)
    assert theirs.get_output_embeddings() is head and theirs.get_input_embeddings() is embedding
    assert theirs(torch.arange(7)[None]).logits.shape == (1, 7, 7)


def test_the_vocabulary_can_be_resized(folder: Path, ours: Transformer, tmp_path: Path) -> None:
    theirs, tokens, old = loaded(folder), random_tokens(2, 9), ours.args.vocab_size
    theirs.resize_token_embeddings(old + 3)
    assert theirs.config.vocab_size == old + 3
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) == ours.args.tie_embeddings
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(logits[..., :old], ours(tokens), **EXACT)
        assert theirs(torch.tensor([[old + 2]])).logits.shape == (1, 1, old + 3)
        theirs.save_pretrained(tmp_path)
        torch.testing.assert_close(loaded(tmp_path)(tokens).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_and_scales_stay_float32_in_a_model_of_any_dtype(
    variant: str, dtype: torch.dtype, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    export_checkpoint(trained(variant, tmp_path_factory), tmp_path / "small", dtype="bfloat16", table_dtype="int8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True, dtype=dtype).eval()
    dtypes = {name: tensor.dtype for name, tensor in theirs.state_dict().items() if tensor.dtype.is_floating_point}
    kept = {name for name in dtypes if name.endswith(("running_mean", "running_var", "_scale"))}
    assert len(kept) == 8 and all(dtypes[name] == torch.float32 for name in kept)
    assert all(dtypes[name] == dtype for name in dtypes.keys() - kept)
    with torch.no_grad():
        assert theirs(random_tokens(1, 10)).logits.dtype == dtype


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
def test_router_scores_are_not_rounded_in_a_bfloat16_model(folder: Path) -> None:
    peer = loaded(folder).to(torch.bfloat16).layers[1].peer
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        scores, _ = peer.retrieve(x, None)
        queries = peer.query_norm(peer.wq(x).float().unflatten(-1, (-1, peer.peer["query_dim"])), None)
        keys = [axis.float() for axis in peer.sub_keys]
        wanted, _ = product_key_retrieve(queries, keys, peer.peer["num_experts_per_tok"])
    torch.testing.assert_close(scores, wanted, **EXACT)


def test_autocast_rounds_what_it_rounds_in_titan_peer_and_neither_scores_nor_sums_over_experts(
    theirs: Any, ours: Transformer
) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    our_peer, their_peer = ours.layers[1].peer, theirs.layers[1].peer
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        our_indices, our_scores = our_peer.retrieve(x)
        scores, indices = their_peer.retrieve(x, None)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, our_scores, rtol=1e-5, atol=1e-5)
        assert (indices == our_indices).float().mean() > 0.99  # everything except ties

        of_ours = our_peer(x[None], ours.shared_experts)
        found = their_peer(x[None], None, theirs.shared_experts)
    assert found.dtype == of_ours.dtype == torch.bfloat16
    assert (found == of_ours).float().mean() > 0.97  # the others: order of sums, near a rounding boundary
    torch.testing.assert_close(found, of_ours, rtol=2**-7, atol=1e-3)


# ---- training


def losses_batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Labels, in a different number per row, and the same labels at titan_peer's positions."""
    labels = tokens.clone()
    labels[:, 0] = -100
    labels[0, 5:] = -100
    labels[1, :13] = -100
    return labels, torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def test_the_loss_is_ours_and_is_divided_by_the_number_that_is_given(ours: Transformer, theirs: Any) -> None:
    tokens = random_tokens(4, 20)
    labels, shifted = losses_batch(tokens)
    with torch.no_grad():
        summed = ours(tokens, labels=shifted)
        torch.testing.assert_close(theirs(tokens, labels=labels).loss, summed / (shifted != -100).sum(), **EXACT)
        torch.testing.assert_close(theirs(tokens, labels=labels, num_items_in_batch=100).loss, summed / 100, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_gradients_nor_running_statistics(folder: Path, reentrant: bool) -> None:
    tokens = random_tokens(2, 30)
    results = []
    for checkpointing in (False, True):
        model = loaded(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
            model.enable_input_require_grads()
        runs = []
        hook = model.layers[1].attention.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        hook.remove()
        assert len(runs) == 1 + checkpointing
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        results.append((loss, gradients, dict(model.named_buffers())))
    assert torch.equal(results[0][0], results[1][0])
    for plain, repeated in zip(results[0][1:], results[1][1:]):
        for name in plain:
            torch.testing.assert_close(repeated[name], plain[name], msg=name, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "variant", ["three axes"], indirect=True
)  # batch norm's statistics differ between micro-batches
def test_gradient_accumulation_gives_the_step_of_the_big_batch(folder: Path, ours: Transformer, tmp_path: Path) -> None:
    tokens = random_tokens(4, 20)
    labels, shifted = losses_batch(tokens)
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]

    def stepped(micro_batch: int) -> Any:
        model = loaded(folder)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=4 // micro_batch,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = TransformersTrainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        return dict(model.named_parameters())

    before = dict(ours.named_parameters())
    loss = ours.requires_grad_(True)(tokens, labels=shifted) / (shifted != -100).sum()
    gradients = torch.autograd.grad(loss, list(before.values()))
    ours.requires_grad_(False)
    wanted = {name: before[name] - 0.5 * gradient for name, gradient in zip(before, gradients)}
    for micro_batch in (4, 1):
        after = stepped(micro_batch)
        assert after.keys() == wanted.keys()
        for name, parameter in after.items():
            torch.testing.assert_close(parameter, wanted[name], msg=f"{name}, micro-batches of {micro_batch}", **EXACT)
    assert not torch.allclose(wanted["tok_embeddings.weight"], before["tok_embeddings.weight"], **EXACT)


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
def test_batch_norm_in_training_is_ours_and_does_not_count_padding(theirs: Any) -> None:
    kind = type(theirs.layers[1].peer.query_norm)
    torch.manual_seed(0)
    queries = 1024 + torch.randn(50, 2, 8)  # far from zero, where E[q^2] - mean^2 loses all digits
    reference = QueryBatchNorm(2, 8)
    reference.reset_parameters()
    wanted = reference.train()(queries)
    for padding in (0, 9):
        norm = kind(2, 8).train()
        padded = torch.cat([queries, torch.full((padding, 2, 8), -1e3)])
        is_token = torch.arange(50 + padding) < 50
        out = norm(padded, is_token if padding else None)
        norm.update_running_statistics()
        for theirs_got, ours_got in ((out[:50], wanted), (norm.running_mean, reference.running_mean)):
            torch.testing.assert_close(theirs_got, ours_got, rtol=1e-5, atol=1e-3)  # 1024 has steps of 1.2e-4
        torch.testing.assert_close(norm.running_var, reference.running_var, rtol=1e-5, atol=1e-5)
    before = norm.running_mean.clone()
    assert norm(padded, torch.zeros_like(is_token)).isfinite().all()
    norm.update_running_statistics()
    assert torch.equal(norm.running_mean, before)


def test_lora_on_the_attention_projections(folder: Path, theirs: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    names = {"wq", "wq_a", "wq_b", "wkv_a", "wkv_b", "wo"}
    targets = rf".*attention\.({'|'.join(names)})"
    model = get_peft_model(loaded(folder), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {name for name in names if hasattr(theirs.layers[0].attention, name)}
    tokens = random_tokens(2, 20)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    model.train()
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    trained_matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(matrix.abs().max() > 0 for matrix in trained_matrices)

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        assert not torch.allclose(logits, theirs(tokens).logits, atol=1e-2)
        # one token at a time, for which attention is computed in another way
        cache = model(input_ids=tokens[:, :10]).past_key_values
        steps = [model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(10, 20)]
        torch.testing.assert_close(torch.cat(steps, dim=1), logits[:, 10:], rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(loaded(folder), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=tokens).logits, logits, rtol=0, atol=0)
        torch.testing.assert_close(model.merge_and_unload()(tokens).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_model_made_anew_begins_as_ours(folder: Path, ours: Transformer) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.device("meta"):
        fresh = Transformer(ours.args)
    fresh.to_empty(device="cpu")
    fresh.init_weights()
    wanted = fresh.state_dict()
    state = theirs.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.std(), wanted[name].std(), rtol=0.2, atol=1e-3, msg=name)
        torch.testing.assert_close(tensor.mean(), wanted[name].mean(), rtol=0.1, atol=0.05, msg=name)


@pytest.mark.slow
def test_all_of_this_holds_with_the_oldest_transformers_that_is_allowed(tmp_path: Path) -> None:
    allowed = next(
        line for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines() if "transformers>=" in line
    )
    oldest = re.search(r"transformers>=(\d+\.\d+)", allowed)[1]
    needs = [f"transformers=={oldest}.*", "tokenizers>=0.22,<=0.23.0", "huggingface-hub>=1.3,<2", "typer-slim"]
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "packages"),
        *needs,
    ]
    subprocess.run(install, check=True)
    paths = os.pathsep.join([str(tmp_path / "packages"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    shown = subprocess.run(
        version, env=environment, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    assert shown.startswith(f"{oldest}.")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(Path(__file__)), "--basetemp", str(tmp_path / "tests")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-5000:]
