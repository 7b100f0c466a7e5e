"""A small model decodes on a CPU in one thread, and the number of threads is then as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_models import build_model

from titan_peer.data.tokenizer import ByteTokenizer
from titan_peer.inference import generator as module
from titan_peer.inference.decoder import Decoder
from titan_peer.inference.generator import Generator, SamplingParams
from titan_peer.model import Transformer

PARAMS = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
Threads = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if torch had started with three threads and nobody had set their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(module, "_THREADS_OF_TORCH", 3)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """The number of threads in each pass of a decoder, and whether the pass was over prompts or over one token per
    sequence."""
    found: Threads = []
    whole_pass = Decoder.__call__

    def counted(self: Decoder, tokens: torch.Tensor, *args: object) -> torch.Tensor:
        found.append(("decode" if tokens.shape[1] == 1 else "prefill", torch.get_num_threads()))
        return whole_pass(self, tokens, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "__call__", counted)
    return found


@pytest.fixture
def model() -> Transformer:
    return build_model(vocab_size=258)


def test_a_small_model_decodes_in_one_thread_and_reads_prompts_in_all(threads: Threads, model: Transformer) -> None:
    for piece in Generator(model, ByteTokenizer()).stream(["once", "twice upon"], PARAMS):
        assert piece is not None and torch.get_num_threads() == 3  # between the steps, for the consumer of the text
    assert threads == [("prefill", 3)] * 2 + [("decode", 1)] * 5  # of two lengths
    assert torch.get_num_threads() == 3


def test_the_number_is_as_before_after_an_abandoned_stream_and_after_an_error(
    threads: Threads, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Generator(model, ByteTokenizer()).stream(["once"], PARAMS)
    next(stream), next(stream)
    assert threads[-1] == ("decode", 1)
    assert torch.get_num_threads() == 3
    del stream

    generator = Generator(model, ByteTokenizer())

    def fails(*_: object) -> None:
        assert torch.get_num_threads() == 1
        raise RuntimeError("no further")

    stream = generator.stream(["once"], PARAMS)
    next(stream)
    monkeypatch.setattr(generator, "_choose", fails)
    with pytest.raises(RuntimeError, match="no further"):
        next(stream)
    assert torch.get_num_threads() == 3


def test_a_model_with_more_to_read_decodes_in_all_threads(
    threads: Threads, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model, ByteTokenizer())
    monkeypatch.setattr(module, "_ONE_THREAD_BYTES", generator.decoder.bytes_read(2))
    generator.generate(["once", "more"], PARAMS)
    assert ("decode", 3) in threads and ("decode", 1) not in threads
    threads.clear()
    generator.generate(["once"], PARAMS)  # fewer sequences choose fewer rows
    assert ("decode", 1) in threads and ("decode", 3) not in threads


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_that_the_user_has_set_is_kept(
    name: str, threads: Threads, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    Generator(model, ByteTokenizer()).generate(["once"], PARAMS)
    assert {count for _, count in threads} == {2}
    torch.set_num_threads(3)
    monkeypatch.setenv(name, "3")
    threads.clear()
    Generator(model, ByteTokenizer()).generate(["once"], PARAMS)
    assert {count for _, count in threads} == {3}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_what_a_step_reads_is_the_model_without_the_rows_that_are_not_chosen(tied: bool, shared: bool) -> None:
    model = build_model(vocab_size=258, tie_embeddings=tied, peer__share_experts=shared)
    args, decoder = model.args, Decoder(model, compile=False)
    names = [name for name, _ in model.named_parameters() if "expert_" not in name and "tok_embeddings" not in name]
    read = sum(model.get_parameter(name).numel() for name in names) + (258 * args.dim if tied else 0)
    layers = len(list(args.layers_of("peer")))
    rows = layers * args.peer.num_heads * args.peer.num_experts_per_tok * 2 * args.dim * args.peer.expert_hidden_size
    assert [decoder.bytes_read(count) for count in (1, 3)] == [4 * (read + rows), 4 * (read + 3 * rows)]
