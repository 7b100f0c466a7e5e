"""Tokens to text, token by token: what a person watches while a completion is made."""

from __future__ import annotations

from collections.abc import Sequence

from titan_peer.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder writes, once, for bytes at the end that are the beginning of a character
_CONTEXT = 8  # tokens decoded along at least, so that a token's leading space is not taken for the text's
_WINDOW = 32  # tokens decoded at a time at most, as long as they have text


class TextStream:
    """The text of a completion, in pieces that do not change any more, up to the first stop string.

    The pieces together are what decoding prompt and completion at once gives beyond the text of the prompt. A short
    window is decoded at a time, so that the tokens of a long completion cost no more than those of a short one.

    Args:
        prompt: ids before the completion; some decoders drop a space where they see nothing before it.
        stop: strings at the first of which the text ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._window = self._end_of(prompt)
        self._limit = _WINDOW
        self._taken = tokenizer.decode(self._window)  # text of the window that is the prompt's or has been taken
        self._held = ""  # text that may be the beginning of a stop string
        self.text = ""  # all that has been given out
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not before."""
        self._window.append(token)
        new = self._take(self._stable())
        if new and len(self._window) > self._limit:
            self._window = self._end_of(self._window)
            self._limit = max(_WINDOW, 2 * len(self._window))
            self._taken = self._stable()
        return self._give_out(new, flush=False)

    def finish(self) -> str:
        """No more tokens come; returns what was held back."""
        if self.stopped:
            return ""
        return self._give_out(self._take(self._tokenizer.decode(self._window)), flush=True)

    def _stable(self) -> str:
        """The window's text without a last character that further tokens may complete."""
        return self._tokenizer.decode(self._window).removesuffix(_INCOMPLETE)

    def _take(self, text: str) -> str:
        """What the window's text has beyond that taken before; an incomplete end of the prompt may be completed by it."""
        new = beyond(self._taken, text)
        if new:
            self._taken = text
        return new

    def _end_of(self, ids: Sequence[int]) -> list[int]:
        """Some of the last ids, after which all that follows is decoded as after all ids."""
        count = _CONTEXT
        while count < len(ids) and not _anchors(self._tokenizer.decode(ids[-count:])):
            count *= 2
        return list(ids[-count:])

    def _give_out(self, new: str, *, flush: bool) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        elif not flush:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def beyond(before: str, whole: str) -> str:
    """What the text of some tokens and further ones has beyond that of the former; these may end inside a character."""
    return whole[_shared(before, whole) :]


def _shared(a: str, b: str) -> int:
    """Length of the longest beginning that both have."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def text_in_context(
    tokenizer: Tokenizer, before: Sequence[int], token: int, after: Sequence[int]
) -> tuple[str, str, str]:
    """The text of a token and of what is around it, blanks where they are in the text; part of a character is U+FFFD."""
    start, until = tokenizer.decode(before), tokenizer.decode([*before, token])
    whole = tokenizer.decode([*before, token, *after])
    return whole[: _shared(start, whole)], beyond(start, until) or tokenizer.decode([token]), beyond(until, whole)


def _anchors(text: str) -> bool:
    """Whether it has a character that does not depend on what comes before: no white space, which may be stripped at the
    beginning, and none that may be the rest of a character."""
    return any(not (character.isspace() or character == _INCOMPLETE) for character in text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
