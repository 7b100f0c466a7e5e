"""Tokenizers: any Hugging Face tokenizer.json, a tiktoken file, or the bytes of the text."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import AddedToken

from titan_peer.common.errors import TransientError, UserError, is_transient
from titan_peer.data.byte_fallback import ByteRuns
from titan_peer.data.special_tokens import Specials, SpecialToken, begin_and_end


class Tokenizer(Protocol):
    """What training, evaluation and decoding need from a tokenizer."""

    vocab_size: int
    """The largest id + 1, special tokens included: every id is below it. Some files skip ids, so it may be more than
    the number of entries."""
    unused_ids: Sequence[int]
    """Ids below vocab_size without an entry: they have no text and occur in no document."""
    bos_id: int | None
    """Begins a document, if the vocabulary has such a token."""
    eos_id: int | None
    """Ends a document, if the vocabulary has such a token."""
    specials: Specials
    """The same two tokens with their names, for messages."""
    fingerprint: str
    """Equal for tokenizers that were read from files with the same content, and only for those."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without begin and end tokens; special tokens spelled out in a text stay text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special tokens and ids without an entry are skipped; each incomplete or broken character
        becomes U+FFFD."""
        ...


_MOST_IDS = 2**27


def fingerprint_of(file: Path) -> str:
    return f"{zlib.crc32(file.read_bytes()):08x}"


def _bound_and_gaps(ids: Iterable[int]) -> tuple[int, list[int]]:
    """The largest id + 1, and the ids below it that are missing."""
    known = set(ids)
    if not known:
        raise ValueError("it has no entries")
    bound = max(known) + 1
    if bound > _MOST_IDS:
        raise ValueError(
            f"it has the id {bound - 1:,}; ids must be below {_MOST_IDS:,}, since a model has a row for each"
        )
    return bound, [] if len(known) == bound else [i for i in range(bound) if i not in known]


class ByteTokenizer:
    """UTF-8 bytes, then a begin and an end token: 258 entries."""

    vocab_size: int = 258
    unused_ids: Sequence[int] = ()
    bos_id: int | None = 256
    eos_id: int | None = 257
    specials: Specials = (
        SpecialToken(256, "a begin token", "the byte tokenizer"),
        SpecialToken(257, "an end token", "the byte tokenizer"),
    )
    fingerprint: str = "byte"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        self.fingerprint = fingerprint_of(file)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.unused_ids: Sequence[int]
        self.vocab_size, self.unused_ids = _bound_and_gaps(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.specials: Specials = begin_and_end(file, self._tokenizer)
        self.bos_id, self.eos_id = (None if token is None else token.id for token in self.specials)
        # so that decoding skips them, even if the file lists them as ordinary entries
        named = [AddedToken(token.text, special=True) for token in self.specials if token is not None]
        self._tokenizer.add_special_tokens(named)
        self._byte_runs = ByteRuns(self._tokenizer)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(self._byte_runs.mended(ids), skip_special_tokens=True)
        return text


class TiktokenTokenizer:
    """A .tiktoken file (one line per entry: its bytes in base 64, its rank), with a begin and an end token added.

    The file does not say how text is split into words. Names with "r50k", "p50k" or "gpt2" are split as GPT-2 does,
    names with "o200k" as GPT-4o does, all others as GPT-4 and Llama 3 do.
    """

    def __init__(self, file: Path) -> None:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        ranks = load_tiktoken_bpe(str(file))
        self.unused_ids: Sequence[int]
        first, self.unused_ids = _bound_and_gaps(ranks.values())
        self._tokenizer = tiktoken.Encoding(
            name=file.stem, pat_str=split_pattern(file.stem), mergeable_ranks=ranks, special_tokens={}
        )
        self.bos_id: int | None = first
        self.eos_id: int | None = first + 1
        self.specials: Specials = (
            SpecialToken(first, "a begin token", "the number of entries"),
            SpecialToken(first + 1, "an end token", "the number of entries"),
        )
        self.vocab_size = first + 2
        self._ids = frozenset(ranks.values())
        self.fingerprint = fingerprint_of(file)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode_ordinary_batch(list(texts), num_threads=2)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i in self._ids])


_CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
_SPLIT_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLIT_GPT4 = _CONTRACTIONS + (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SPLIT_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?:{_CONTRACTIONS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?:{_CONTRACTIONS})?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_pattern(name: str) -> str:
    if any(part in name for part in ("r50k", "p50k", "gpt2")):
        return _SPLIT_GPT2
    return _SPLIT_GPT4O if "o200k" in name else _SPLIT_GPT4


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of `model.tokenizer_path`.

    Args:
        path: "byte", a tokenizer.json, a folder that holds one, or a .tiktoken file.
    Raises:
        UserError: there is no such file, it is not a tokenizer, or the library for it is missing.
    """
    if path == "byte":
        return ByteTokenizer()
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            f'model.tokenizer_path = {path}: there is no file {file}; give a tokenizer.json, a .tiktoken file or "byte" '
            "(titan-peer data train-tokenizer makes a tokenizer.json)"
        )
    is_tiktoken = file.suffix == ".tiktoken"
    try:
        return TiktokenTokenizer(file) if is_tiktoken else FileTokenizer(file)
    except ImportError:
        raise UserError(
            f"model.tokenizer_path = {path}: needs tiktoken; install it with: pip install 'titan_peer[data]'"
        ) from None
    except (UserError, TransientError):
        raise
    except Exception as error:  # the libraries raise bare Exception
        kind = ".tiktoken file" if is_tiktoken else "tokenizer.json"
        if is_transient(error):
            raise TransientError(f"model.tokenizer_path = {path}: {file}: cannot be read: {error}") from None
        raise UserError(f"model.tokenizer_path = {path}: {file} is not a {kind}: {error}") from None
