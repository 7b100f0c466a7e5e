"""Tokens to text, token by token: what a person watches while a completion is made."""

from __future__ import annotations

from collections.abc import Sequence

from titan_peer.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder writes, once, for bytes at the end that are the beginning of a character
_CONTEXT = 8  # tokens decoded along, so that a token's leading space is not taken for the text's
_WINDOW = 32  # tokens decoded at a time at most


class TextStream:
    """The text of a completion, in pieces that do not change any more, up to the first stop string.

    Decodes a short window at a time, so that a long completion costs no more a token than a short one.

    Args:
        prompt: ids before the completion; some decoders drop a space where they see nothing before it.
        stop: strings at the first of which the text ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._window = list(prompt[-_CONTEXT:])
        self._taken = len(self._stable())  # characters of the window's text that are the prompt's or have been taken
        self._held = ""  # text that may be the beginning of a stop string
        self.text = ""  # all that has been given out
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not before."""
        self._window.append(token)
        stable = self._stable()
        new = stable[self._taken :]
        self._taken = len(stable)
        if len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._taken = len(self._stable())
        return self._give_out(new, flush=False)

    def finish(self) -> str:
        """No more tokens come; returns what was held back."""
        if self.stopped:
            return ""
        return self._give_out(self._tokenizer.decode(self._window)[self._taken :], flush=True)

    def _stable(self) -> str:
        """The window's text without a last character that further tokens may complete."""
        return self._tokenizer.decode(self._window).removesuffix(_INCOMPLETE)

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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
