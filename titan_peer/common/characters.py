"""Text input and output: bytes that are not UTF-8, halves of surrogate pairs, characters that the output's encoding
lacks.

Python turns a byte of an argument that it cannot decode into a "lone surrogate", and JSON may contain one (half of a
surrogate pair): a code point that is not a character, and that neither tokenizers nor files accept.
"""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper

from titan_peer.common.errors import UserError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def require_whole(text: str, what: str) -> str:
    """Return the text if it has no lone surrogate.

    Args:
        what: the text's name for the user, for the message.
    Raises:
        UserError: it contains a byte that was not UTF-8, or half of a surrogate pair.
    """
    found = _LONE_SURROGATE.search(text)
    if found is None:
        return text
    code = ord(found[0])
    # bytes of arguments that cannot be decoded (PEP 383)
    kind = f"the byte {code - 0xDC00:#04x}, which is not {_encoding_of_arguments()}" if 0xDC80 <= code <= 0xDCFF else ""
    kind = kind or f"half of a surrogate pair (\\u{code:04x}), which is not a character"
    raise UserError(f"{what}: has {kind}, after {text[: found.start()][-30:]!r}")


def with_whole_characters(text: str) -> str:
    """The text with every lone surrogate replaced by U+FFFD."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def read_standard_input() -> str:
    """All of standard input, decoded as UTF-8 with or without a byte order mark, like every text file.

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
    r"""From now on standard output writes a character that its encoding lacks as \uXXXX instead of raising an error."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def lacking_encoding() -> str:
    """The name of standard output's encoding if that lacks some characters, else ""."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        "日🙂".encode(encoding)
    except UnicodeEncodeError:
        return encoding
    return ""


def _encoding_of_arguments() -> str:
    encoding = sys.getfilesystemencoding()
    return "UTF-8" if encoding.replace("-", "").lower() == "utf8" else f"{encoding} as the locale says"
