"""Text that comes from outside or goes there: bytes that are no UTF-8, halves of surrogate pairs, characters that an output lacks.

Python keeps a byte of an argument that it cannot decode, and JSON may spell half of a surrogate pair, as a "lone surrogate": a
place in a string that is no character, and that no tokenizer and no file takes.
"""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper

from titan_peer.common.errors import UserError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def require_whole(text: str, what: str) -> str:
    """The text.

    Args:
        what: what the user calls it, for the message.
    Raises:
        UserError: it holds a byte that was no UTF-8, or half of a surrogate pair.
    """
    found = _LONE_SURROGATE.search(text)
    if found is None:
        return text
    code = ord(found[0])
    # bytes of arguments that cannot be decoded (PEP 383)
    kind = f"the byte {code - 0xDC00:#04x}, which is not {_encoding_of_arguments()}" if 0xDC80 <= code <= 0xDCFF else ""
    kind = kind or f"half of a surrogate pair (\\u{code:04x}), which is no character"
    raise UserError(f"{what}: has {kind}, after {text[: found.start()][-30:]!r}")


def with_whole_characters(text: str) -> str:
    """The text with U+FFFD in the place of every lone surrogate."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def read_standard_input() -> str:
    """All of standard input, which is UTF-8 as all text files are, with or without a byte order mark.

    Raises:
        UserError: it is not UTF-8.
    """
    if not isinstance(sys.stdin, TextIOWrapper):
        return sys.stdin.read()
    content = sys.stdin.buffer.read()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"standard input: line {line} has the byte {content[error.start]:#04x}, which is not UTF-8; convert the text, for "
            "example with: iconv -f latin1 -t utf-8"
        ) from None


def write_every_character() -> None:
    r"""From now on standard output spells a character that its encoding lacks as \uXXXX, where it would raise an error."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def lacking_encoding() -> str:
    """The name of standard output's encoding if there are characters that it lacks, else nothing."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        "日🙂".encode(encoding)
    except UnicodeEncodeError:
        return encoding
    return ""


def _encoding_of_arguments() -> str:
    encoding = sys.getfilesystemencoding()
    return "UTF-8" if encoding.replace("-", "").lower() == "utf8" else f"{encoding} as the locale says"
