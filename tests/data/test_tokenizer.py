"""Each kind of tokenizer returns the text again, and the same ids as an independent implementation."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from corpora import ROOT, TOKENIZER, make_loader, sample_texts, tokenizer_with_a_gap, write_jsonl
from tokenizers import Regex, decoders, models, pre_tokenizers

from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.parse import load_config
from titan_peer.config.resolve import resolve_vocabulary
from titan_peer.data import streams
from titan_peer.data.streams import DocumentEncoder
from titan_peer.data.tokenizer import TiktokenTokenizer, load_tokenizer

HARD_TEXTS = [
    "It's 1234567 o'clock,\r\n\r\n  isn't IT'LL ÉTÉ-été 北京 🙂🏽 \t x\n",
    "  ",
    "\n\n a",
    "don't",
    "<|end_of_text|>",
]


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled vocabulary as a tiktoken file: bytes and ranks."""
    byte_of = {c: b for b, c in byte_characters().items()}
    vocabulary = json.loads((ROOT / "assets/tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    pieces = [bytes(byte_of[c] for c in piece) for piece in sorted(vocabulary, key=vocabulary.get)[2:]]
    path = tmp_path_factory.mktemp("tiktoken") / "sample.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(p).decode()} {rank}\n" for rank, p in enumerate(pieces)), encoding="utf-8"
    )
    return path


def byte_characters() -> dict[int, str]:
    """The character for each byte in byte-level BPE files: printable ones unchanged, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return {b: chr(b if b in printable else next(others)) for b in range(256)}


@pytest.mark.parametrize("kind", ["byte", "file", "tiktoken"])
def test_decoding_gives_back_the_text(kind: str, tiktoken_file: Path) -> None:
    tokenizer = load_tokenizer({"byte": "byte", "file": TOKENIZER, "tiktoken": str(tiktoken_file)}[kind])
    texts = [*HARD_TEXTS, *sample_texts(0, 200)]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert max(map(max, encoded)) < min(tokenizer.bos_id, tokenizer.eos_id) or kind == "file"
    assert tokenizer.decode([tokenizer.bos_id, *encoded[0], tokenizer.eos_id]) == texts[0]
    assert tokenizer.vocab_size > max(tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_tiktoken_files_give_the_ids_of_the_tokenizers_library(name: str, tiktoken_file: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.tiktoken"
    path.write_bytes(tiktoken_file.read_bytes())
    ours = TiktokenTokenizer(path)
    # the other library, with the same entries; its merges are all ways to make an entry of two
    characters = byte_characters()
    ranks = {base64.b64decode(a): int(b) for a, b in map(str.split, path.read_text(encoding="utf-8").splitlines())}
    spelled = {"".join(characters[b] for b in piece): rank for piece, rank in ranks.items()}
    merges = sorted(
        (rank, i, (piece[:i], piece[i:]))
        for piece, rank in spelled.items()
        for i in range(1, len(piece))
        if piece[:i] in spelled and piece[i:] in spelled
    )
    other = tokenizers.Tokenizer(models.BPE(vocab=spelled, merges=[pair for _, _, pair in merges]))
    split = pre_tokenizers.Split(Regex(ours._tokenizer._pat_str), behavior="isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    other.decoder = decoders.ByteLevel()
    texts = [*HARD_TEXTS, *sample_texts(0, 300)]
    assert ours.encode_batch(texts) == [e.ids for e in other.encode_batch(texts)]


def test_words_are_split_as_the_name_of_the_tiktoken_file_says(tiktoken_file: Path, tmp_path: Path) -> None:
    import regex

    splits = {}
    for name in ("gpt2", "cl100k", "o200k"):
        (tmp_path / f"{name}.tiktoken").write_bytes(tiktoken_file.read_bytes())
        pattern = TiktokenTokenizer(tmp_path / f"{name}.tiktoken")._tokenizer._pat_str
        splits[name] = regex.findall(pattern, "HTMLParser isn't 12345")
    assert splits["gpt2"] == ["HTMLParser", " isn", "'t", " 12345"]
    assert splits["cl100k"] == ["HTMLParser", " isn", "'t", " ", "123", "45"]
    assert splits["o200k"] == ["HTMLParser", " isn't", " ", "123", "45"]


@pytest.mark.parametrize("content", ["", "not base64\n", "aGk= one\n"])
def test_a_file_that_is_not_tiktoken_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"a.tiktoken is not a .tiktoken file"):
        load_tokenizer(str(tmp_path / "a.tiktoken"))


@pytest.mark.parametrize("largest_id", [4156, 70_000])
def test_the_vocabulary_is_bounded_by_the_largest_id_not_by_the_number_of_entries(
    largest_id: int, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_with_a_gap(tmp_path, largest_id)))
    assert tokenizer.vocab_size == largest_id + 1
    assert list(tokenizer.unused_ids) == list(range(4095, largest_id))
    assert tokenizer.encode_batch([" giving"]) == [[largest_id]]
    assert tokenizer.decode([largest_id - 1, largest_id, 4095]) == " giving"

    config = load_config(["--job.config_file", str(ROOT / "train_configs/debug_model.toml")])
    resolve_vocabulary(config.model, tokenizer.vocab_size)
    source = DataSource(str(write_jsonl(tmp_path / "a.jsonl", ["thanks giving"])))
    batch = next(make_loader([source], tokenizer=str(tmp_path), seq_len=8))
    assert batch["tokens"].max() == batch["labels"].max() == largest_id
    assert torch.nn.Embedding(config.model.vocab_size, 1)(batch["tokens"]).shape == (8, 8, 1)

    config.model.vocab_size = 4096
    with pytest.raises(UserError, match=rf"has ids up to {largest_id}; give at least {largest_id + 1}, or 0"):
        resolve_vocabulary(config.model, tokenizer.vocab_size)


def test_a_tiktoken_file_that_leaves_ranks_out_has_their_ids_unused(tiktoken_file: Path, tmp_path: Path) -> None:
    lines = tiktoken_file.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "gap.tiktoken"
    path.write_text("\n".join([*lines[:300], "IGdpdmluZw== 500"]) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocab_size == 503 and list(tokenizer.unused_ids) == list(range(300, 500))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (501, 502)
    assert tokenizer.decode([501, 400, 500, 502, 900]) == " giving"


@pytest.mark.parametrize("vocabulary", [{}, {"a": 2**31}])
def test_a_vocabulary_that_no_model_can_have_is_refused(vocabulary: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(path))
    with pytest.raises(
        UserError, match=r"it has no entries|it has the id 2,147,483,648; ids must be below 134,217,728"
    ):
        load_tokenizer(str(path))


def test_begin_and_end_tokens_are_put_by_key() -> None:
    tokenizer = load_tokenizer("byte")
    (document,) = DocumentEncoder(tokenizer).encode_texts(["a"])
    for bos, eos, expected in ((True, True, [256, 97, 257]), (False, True, [97, 257]), (False, False, [97])):
        encoder = DocumentEncoder(tokenizer, add_bos=bos, add_eos=eos)
        assert encoder.with_borders(document.ids).tolist() == expected


def test_long_texts_are_tokenised_in_pieces_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    text = " ".join(" ".join(sample_texts(0, 100)).split())
    whole = tokenizer.encode_batch([text])[0]
    monkeypatch.setattr(streams, "_LONGEST_PIECE", 1000)
    (document,) = DocumentEncoder(tokenizer).encode_texts([text])
    assert document.ids.tolist() == whole and document.num_bytes == len(text.encode())
    # without any white space it is cut where the piece is full
    (solid,) = DocumentEncoder(tokenizer).encode_texts(["x" * 5555])
    assert tokenizer.decode(solid.ids.tolist()) == "x" * 5555
