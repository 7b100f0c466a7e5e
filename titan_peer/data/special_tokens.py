"""Which tokens of a tokenizer begin and end documents.

Names are not enough: in one file `<s>` is the begin token, in another it is ordinary text. So the settings files beside
a tokenizer.json come first, and after them only entries that the file itself marks as special.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from titan_peer.common.errors import UserError, os_failure
from titan_peer.config.job import Data

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")

# In the order of preference; the first that is a special token of the file is taken.
_BOS = ("<|begin_of_text|>", "<|begin▁of▁sentence|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>", "<|startoftext|>")
_EOS = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|endoftext|>")


class SpecialToken(NamedTuple):
    """A token that begins or ends documents."""

    id: int
    text: str
    named_by: str
    """Where this is stated: a settings file, or the special tokens of tokenizer.json."""


Specials = tuple[SpecialToken | None, SpecialToken | None]
"""The begin and the end token."""


def begin_and_end(file: Path, tokenizer: tokenizers.Tokenizer) -> Specials:
    """The begin and the end token of a tokenizer.json.

    Raises:
        UserError: a settings file beside it is damaged, or names a token that the vocabulary does not have.
    """
    # a file with another name may lie in a folder of many tokenizers, and the settings there may not be its own
    settings = [_read(file.with_name(name)) for name in SETTINGS_FILES] if file.name == "tokenizer.json" else []
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def find(key: str, names: tuple[str, ...]) -> SpecialToken | None:
        for name, values in zip(SETTINGS_FILES, settings):
            if key in values:
                return _named(key, values[key], file.with_name(name), tokenizer)
        known = next((name for name in names if name in special), None)
        return None if known is None else SpecialToken(special[known], known, f"the special tokens of {file.name}")

    return find("bos_token", _BOS), find("eos_token", _EOS)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise os_failure(f"{file}: cannot be read", error) from None
    except ValueError as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return values


def _named(key: str, value: Any, file: Path, tokenizer: tokenizers.Tokenizer) -> SpecialToken | None:
    """The token that a settings file names; null says that there is none."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    number = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if number is None:
        raise UserError(
            f"{file}: {key} = {text!r}: tokenizer.json has no such token; give one that it has, or null for none"
        )
    return SpecialToken(number, text, file.name)


def describe(specials: Specials, data: Data) -> str:
    """What documents begin and end with, as one line to read."""
    used = [token if wanted else None for token, wanted in zip(specials, (data.add_bos, data.add_eos))]
    words = [
        f"{verb} without a token" if token is None else f"{verb} with {token.text} ({token.id})"
        for verb, token in zip(("begin", "end"), used)
    ]
    named_by = dict.fromkeys(token.named_by for token in used if token is not None)
    return f"documents {words[0]}, {words[1]}" + (f"; by {' and '.join(named_by)}" if named_by else "")


def missing(specials: Specials, data: Data) -> Iterator[str]:
    """A warning for each kind of token that the job asks for and the tokenizer does not have."""
    asked = (("data.add_bos", data.add_bos, "begin"), ("data.add_eos", data.add_eos, "end"))
    for (key, wanted, kind), token in zip(asked, specials):
        if wanted and token is None:
            yield (
                f"{key} = true, but the tokenizer has no {kind} token: documents {kind} without one; name it as "
                f"{key[-3:]}_token in a {SETTINGS_FILES[0]} beside tokenizer.json, or set {key} = false"
            )
