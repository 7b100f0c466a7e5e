"""Tokenizers: any Hugging Face tokenizer.json, or the bytes of the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from titan_peer.errors import UserError


class Tokenizer(Protocol):
    """What training, evaluation and decoding need of a tokenizer."""

    vocab_size: int
    """Entries, special tokens included; ids are below it."""
    bos_id: int | None
    """Begins a document, if the vocabulary has such a token."""
    eos_id: int | None
    """Ends a document, if the vocabulary has such a token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without begin and end tokens; special tokens spelled out in a text stay text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; begin and end tokens are left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, then a begin and an end token: 258 entries."""

    vocab_size: int = 258
    bos_id: int | None = 256
    eos_id: int | None = 257

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    # In the order of preference; the first that the vocabulary has is taken.
    _BOS = ("<|begin_of_text|>", "<|begin▁of▁sentence|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>", "<|startoftext|>")
    _EOS = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|endoftext|>")

    def __init__(self, file: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self._first_known(self._BOS), self._first_known(self._EOS)

    def _first_known(self, names: Sequence[str]) -> int | None:
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of `model.tokenizer_path`.

    Args:
        path: "byte", a tokenizer.json, or a folder that holds one.
    Raises:
        UserError: there is no such file, or it is not a tokenizer.
    """
    if path == "byte":
        return ByteTokenizer()
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f'model.tokenizer_path = {path}: there is no file {file}; give a tokenizer.json or "byte"')
    try:
        return FileTokenizer(file)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"model.tokenizer_path = {path}: {file} is not a tokenizer.json: {error}") from None
