"""Small tokenizers of every common kind, made with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ["the", "quick", "brown", "fox", "ing", "hello", "naïve", "日本", "語", "d'or", "x"]
SPECIAL = ["<unk>", "<s>", "</s>"]
_LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyz'.,!?\n" + "".join(WORDS)))


def _pieces(*, blank: str, with_bytes: bool) -> list[str]:
    """A vocabulary: special tokens, bytes, the space, letters, and words with and without a space before them."""
    names = [*SPECIAL, *([f"<0x{byte:02X}>" for byte in range(256)] if with_bytes else []), blank, *_LETTERS]
    return list(dict.fromkeys([*names, *(blank + letter for letter in _LETTERS), *WORDS, *(blank + w for w in WORDS)]))


def _merges(vocab: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
    """Merges that build each word letter by letter; the parts that are missing are added to the vocabulary."""
    merges = {}
    for word in words:
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            merges[word[: end - 1], word[end - 1]] = None
    return list(merges)


def _byte_fallback_bpe() -> Tokenizer:
    pieces = _pieces(blank="▁", with_bytes=True)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    words = [piece for piece in pieces if len(piece) > 1 and piece not in SPECIAL and piece[0] != "<"]
    merges = _merges(vocab, sorted(words, key=lambda word: word[0] != "▁"))
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def llama_2() -> Tokenizer:
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def mistral() -> Tokenizer:
    """Llama 2's kind, with spaces in the pre-tokenizer instead of the normalizer."""
    tokenizer = llama_2()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    """GPT-2's kind: every byte is a letter, and some letters of a character are merged."""
    vocab = {name: i for i, name in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [letters for word in WORDS for letters, _ in split.pre_tokenize_str(" " + word)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab, words)))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def suffix_bpe() -> Tokenizer:
    """The kind of the first BPE: the end of a word is marked."""
    names = [*SPECIAL, *_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    names = ["[UNK]", "[CLS]", "[SEP]", *_LETTERS, *("##" + letter for letter in _LETTERS), *WORDS, "##ing", "##or"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = _pieces(blank="▁", with_bytes=False)
    tokenizer = Tokenizer(models.Unigram([(piece, -10.0 / len(piece)) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_fallback_unigram() -> Tokenizer:
    pieces = _pieces(blank="▁", with_bytes=True)
    scored = [(piece, -10.0 / len(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_level() -> Tokenizer:
    """Without a decoder: a space between tokens. Its ids have gaps."""
    vocab = {name: 3 * i for i, name in enumerate(["<unk>", *WORDS, ".", "!"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.add_tokens([AddedToken("hello there", normalized=False)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama 2": llama_2,
    "mistral": mistral,
    "gemma": gemma,
    "byte-level BPE": byte_level_bpe,
    "BPE with suffixes": suffix_bpe,
    "WordPiece": word_piece,
    "Unigram": unigram,
    "Unigram with bytes": byte_fallback_unigram,
    "WordLevel": word_level,
}
BYTE_FALLBACK = ["llama 2", "mistral", "gemma", "Unigram with bytes"]
