"""Tokens to text, one token at a time: what a person sees while a completion is made."""

from __future__ import annotations

from collections.abc import Sequence

from titan_peer.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # a decoder writes it once for bytes at the end that begin a character
_CONTEXT = 8  # at least this many earlier tokens are decoded with a token, so that its leading space is kept
_WINDOW = 32  # at most this many tokens are decoded at a time, unless they have no text


class TextStream:
    """The text of a completion, in final pieces, up to the first stop string.

    All pieces together equal the text of prompt and completion decoded at once, without the text of the prompt. Only a
    short window is decoded at a time, so a token of a long completion costs no more than a token of a short one.

    Args:
        prompt: ids before the completion; some decoders drop a space that has nothing before it.
        stop: the text ends at the first of these strings.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._window = self._end_of(prompt)
        self._limit = _WINDOW
        self._taken = tokenizer.decode(self._window)  # text of the window that is the prompt's or has been taken
        self._held = ""  # text that may be the beginning of a stop string
        self.text = ""  # all text returned so far
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become final with it."""
        self._window.append(token)
        new = self._take(self._stable())
        if new and len(self._window) > self._limit:
            self._window = self._end_of(self._window)
            self._limit = max(_WINDOW, 2 * len(self._window))
            self._taken = self._stable()
        return self._give_out(new, flush=False)

    def finish(self) -> str:
        """End the completion; returns the text that was held back."""
        if self.stopped:
            return ""
        return self._give_out(self._take(self._tokenizer.decode(self._window)), flush=True)

    def _stable(self) -> str:
        """The window's text without a last character that further tokens may complete."""
        return self._tokenizer.decode(self._window).removesuffix(_INCOMPLETE)

    def _take(self, text: str) -> str:
        """The part of the window's text that has not been taken yet; it may complete a character that the prompt
        began."""
        new = beyond(self._taken, text)
        if new:
            self._taken = text
        return new

    def _end_of(self, ids: Sequence[int]) -> list[int]:
        """As many of the last ids as are needed for later tokens to decode as they would after all ids."""
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
    """The part of `whole` after `before`, the text of the first tokens, which may end inside a character."""
    return whole[_shared(before, whole) :]


def _shared(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def text_in_context(
    tokenizer: Tokenizer, before: Sequence[int], token: int, after: Sequence[int]
) -> tuple[str, str, str]:
    """The text before a token, of the token, and after it, with the spaces of the text; part of a character is
    U+FFFD."""
    start, until = tokenizer.decode(before), tokenizer.decode([*before, token])
    whole = tokenizer.decode([*before, token, *after])
    return whole[: _shared(start, whole)], beyond(start, until) or tokenizer.decode([token]), beyond(until, whole)


def _anchors(text: str) -> bool:
    """Whether the text has a character that does not depend on the tokens before: not white space, which may be
    stripped at the beginning, and not one that may be the rest of a character."""
    return any(not (character.isspace() or character == _INCOMPLETE) for character in text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
