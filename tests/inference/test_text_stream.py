"""Text decoded token by token, compared with the text of all tokens decoded at once, with every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import BYTE_FALLBACK, KINDS, WORDS

from titan_peer.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from titan_peer.inference.text_stream import TextStream, text_in_context

ROOT = Path(__file__).resolve().parents[2]
TEXTS = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", ".", " 😀", "日本語", "é", "\ufffd", "🏳️‍🌈"]), max_size=30)
QUICK = settings(max_examples=60, deadline=None)


@cache
def both(kind: str) -> tuple[Tokenizer, tokenizers.Tokenizer | None]:
    """Our tokenizer, read from its file, and the library's."""
    if kind == "byte":
        return ByteTokenizer(), None
    if kind == "sample":
        return load_tokenizer(str(ROOT / "assets/tokenizer")), None
    library = KINDS[kind]()
    with TemporaryDirectory() as folder:
        library.save(f"{folder}/tokenizer.json")
        return load_tokenizer(folder), library


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for i in ids:
        pieces.append(stream.push(i))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces


def decoded_at_once(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that the ids add to that of the prompt."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    shared = max(n for n in range(len(before) + 1) if whole.startswith(before[:n]))
    return whole[shared:]


EVERY = [*KINDS, "sample", "byte"]


@pytest.mark.parametrize("kind", EVERY)
@given(data=st.data())
@QUICK
def test_any_ids_stream_as_the_text_of_all_of_them_at_once(kind: str, data: st.DataObject) -> None:
    tokenizer, _ = both(kind)
    # few different ids, because repeated special tokens, spaces and parts of characters cause errors
    some = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=6))
    prompt = data.draw(st.lists(st.sampled_from(some), max_size=40))
    ids = data.draw(st.lists(st.sampled_from(some), max_size=120))
    assert "".join(streamed(tokenizer, prompt, ids)) == decoded_at_once(tokenizer, prompt, ids)


@pytest.mark.parametrize("kind", EVERY)
@given(prompt=TEXTS, words=TEXTS, cut=st.integers(0, 3))
@example(prompt=[], words=[" hi ", " 😀", " there"], cut=0)
@example(prompt=["the"], words=["日本語"] * 20, cut=1)
@QUICK
def test_text_streams_as_the_library_decodes_it(kind: str, prompt: list[str], words: list[str], cut: int) -> None:
    tokenizer, library = both(kind)
    before, ids = (tokenizer.encode_batch(["".join(parts)])[0] for parts in (prompt, words))
    ids = ids[: len(ids) - cut]
    pieces = streamed(tokenizer, before, ids)
    whole = tokenizer.decode([*before, *ids])
    assert "".join(pieces) == decoded_at_once(tokenizer, before, ids)
    if library is not None and (cut == 0 or kind not in BYTE_FALLBACK):
        assert whole == library.decode([*before, *ids])
    if cut == 0 and "\ufffd" not in words:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", EVERY)
@given(prompt=TEXTS, words=TEXTS, place=st.integers(0, 200), length=st.integers(1, 6))
@QUICK
def test_text_ends_before_the_first_stop_string(
    kind: str, prompt: list[str], words: list[str], place: int, length: int
) -> None:
    tokenizer, _ = both(kind)
    before, ids = (tokenizer.encode_batch(["".join(parts)])[0] for parts in (prompt, words))
    whole = decoded_at_once(tokenizer, before, ids)
    stop = whole[place % max(1, len(whole)) :][:length] or "absent"
    assert "".join(streamed(tokenizer, before, ids, [stop, "absent"])) == whole.split(stop)[0]


@pytest.mark.parametrize("stop", [("needle",), ("e hay", "needle"), ("never",), ("k",)])
def test_text_ends_before_the_first_stop_string_and_is_streamed_without_it(stop: tuple[str, ...]) -> None:
    tokenizer = ByteTokenizer()
    text = "in the hay a needle hides, the hayneedle"
    cut = min((place for place in (text.find(s) for s in stop) if place >= 0), default=len(text))
    stream, seen = TextStream(tokenizer, [65, 66], stop), ""
    for token in text.encode():
        seen += stream.push(token)
        assert text.startswith(seen)
        if stream.stopped:
            break
    seen += stream.finish()
    assert seen == stream.text == text[:cut]


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
@given(runs=st.lists(st.one_of(st.binary(max_size=12), st.sampled_from(WORDS)), max_size=8))
@example(runs=["日本語".encode()[:-1]])
@example(runs=["😀".encode()[:2], "the", b"\xff", "日本".encode()])
@QUICK
def test_a_broken_character_of_a_byte_fallback_tokenizer_leaves_its_neighbours_whole(
    kind: str, runs: list[bytes | str]
) -> None:
    """All bytes and words as one string of bytes, decoded by Python."""
    tokenizer, library = both(kind)
    assert library is not None
    first = library.token_to_id("x")
    ids, expected = [first], bytearray(b"x")
    for run in runs:
        if isinstance(run, str):
            ids.append(library.token_to_id(run))
            expected += run.encode()
        else:
            ids += [library.token_to_id(f"<0x{byte:02X}>") for byte in run]
            expected += run
    assert tokenizer.decode(ids) == expected.decode(errors="replace")


def test_a_character_appears_with_its_last_byte_and_can_stop_the_text() -> None:
    tokenizer, _ = both("llama 2")
    pieces = streamed(tokenizer, [], tokenizer.encode_batch(["hi 😀 x"])[0])
    assert pieces == ["h", "i", " ", "", "", "", "😀", " x", ""]
    unending = tokenizer.encode_batch(["🙂語"])[0][1:] * 50
    stream = TextStream(tokenizer, tokenizer.encode_batch(["the"])[0], ["🙂語🙂"])
    count = next(n for n, i in enumerate(unending, 1) if stream.push(i) is not None and stream.stopped)
    assert stream.text == "" and count == 4 + 1 + 4  # bytes of 🙂, 語, bytes of 🙂


def test_a_window_of_tokens_without_text_loses_nothing() -> None:
    """Special tokens have no text, but the bytes before them and the space after them must not be lost."""
    tokenizer, library = both("llama 2")
    assert library is not None
    end = library.token_to_id("</s>")
    head, tail = [library.token_to_id(f"<0x{byte:02X}>") for byte in "日".encode()[:2]], library.token_to_id("<0xA5>")
    the = library.token_to_id("▁the")
    assert "".join(streamed(tokenizer, [the], [*head, *[end] * 100, tail, *[end] * 100, the])) == "日 the"


def test_a_long_text_is_decoded_a_short_window_at_a_time() -> None:
    inner, _ = both("llama 2")
    lengths = []

    class Counting:
        def decode(self, ids: Sequence[int]) -> str:
            lengths.append(len(ids))
            return inner.decode(ids)

    ids = inner.encode_batch(["the quick brown fox 😀 " * 200])[0]
    assert "".join(streamed(Counting(), ids, ids)) == decoded_at_once(inner, ids, ids)  # type: ignore[arg-type]
    # 32, one more to exceed the limit, three for the bytes of an incomplete character
    assert max(lengths) <= 36 and len(lengths) < 2 * len(ids)


def test_a_replacement_character_that_ends_the_prompt_is_the_prompts() -> None:
    tokenizer, _ = both("byte")
    for prompt, ids, expected in (
        ("x\ufffd".encode(), b"abc", "abc"),
        (b"x\xff", b"abc", "abc"),
        (b"x\xe6", b"\x97\xa5!", "日!"),
        (b"x\xe6", b"!", "!"),
        (b"x\xe6", b"", ""),
    ):
        assert "".join(streamed(tokenizer, list(prompt), list(ids))) == expected


def test_a_token_is_shown_in_its_context_with_the_blanks_of_the_text() -> None:
    tokenizer, _ = both("llama 2")
    ids = tokenizer.encode_batch(["the quick 日本 語🙂 x"])[0]
    shown = [text_in_context(tokenizer, ids[:i], ids[i], ids[i + 1 :]) for i in range(len(ids))]
    assert shown[1] == ("the", " quick", " 日本 語🙂 x")
    first = ids.index(tokenizer.encode_batch(["語🙂"])[0][-4])
    # the parts of 🙂
    assert shown[first : first + 4] == [
        ("the quick 日本 語", "\ufffd", "🙂 x"),
        ("the quick 日本 語", "\ufffd", "🙂 x"),
        ("the quick 日本 語", "\ufffd", "🙂 x"),
        ("the quick 日本 語", "🙂", " x"),
    ]
