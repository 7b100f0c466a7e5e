"""Turn a record (a line, a row or a file) into the text of a document, or into a BadDocument with place and reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np
from numpy.typing import NDArray

from titan_peer.common.errors import UserError

# A stream with fewer documents than this would not be representative of the source.
DOCUMENTS_PER_STREAM = 64

BYTE_ORDER_MARK = "\ufeff".encode()


class BadDocument(NamedTuple):
    """A record that is not a valid document."""

    where: str
    """File and line, or file and row."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class TokenizedText(NamedTuple):
    """A document that was tokenised in advance, without begin and end tokens."""

    ids: NDArray[np.int32]
    num_bytes: int


class Divisible(Protocol):
    """A file (or shard) that can be cut into chunks."""

    size: int
    """In bytes or rows, depending on the format."""
    kind: Literal["text", "records", "tokens"]
    """What the files hold: one document each, records with keys, or documents that were tokenised in advance."""

    @property
    def files(self) -> Sequence[Path]:
        """The local files that it is read from."""
        ...

    def approximate_documents(self) -> float: ...

    def divide(self, num_chunks: int) -> None:
        """Cut it into about `num_chunks` chunks, as closely as its format allows."""
        ...

    @property
    def num_chunks(self) -> int: ...

    def records(self, chunk: int, start: int) -> Iterator[str | TokenizedText | BadDocument]:
        """The records of a chunk in order, from the `start`-th on."""
        ...


def _word(value: object) -> str:
    """The name of a JSON value that is not a text."""
    names: dict[type, str] = {bool: f"the value {str(value).lower()}", dict: "an object", list: "a list"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


class RecordReader:
    """Turns records into texts.

    Args:
        text_key: the key that holds the text; not used with a template.
        template: a Jinja template over the record's keys, or "".
        key: the source's place in the job file, such as "data.sources[0]", for error messages.
    Raises:
        UserError: the template is not valid.
    """

    def __init__(self, text_key: str, template: str, max_bytes: int, key: str) -> None:
        self.text_key, self.max_bytes = text_key, max_bytes
        self.columns = [text_key]
        self._template: jinja2.Template | None = None
        if template:
            # Templates come with job files that people pass around: they may read columns, nothing else.
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
            try:
                self._template = environment.from_string(template)
                self.columns = sorted(jinja2.meta.find_undeclared_variables(environment.parse(template)))
            except jinja2.TemplateSyntaxError as error:
                raise UserError(f"{key}.template: is not a valid Jinja template: {error}") from None
            if not self.columns:
                raise UserError(f"{key}.template = {template!r}: uses no column; write {{{{ column }}}}")

    def from_json(self, line: bytes, where: str) -> str | BadDocument:
        if len(line) > self.max_bytes:
            return self.too_large(len(line), where)
        try:
            # some editors put this mark at the start of a file; in concatenated files it can start any line
            record = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
        except UnicodeDecodeError as error:
            return BadDocument(where, f"is not UTF-8 ({error.reason} at byte {error.start})")
        except RecursionError:
            return BadDocument(where, "is nested too deeply")
        except ValueError as error:
            return BadDocument(where, f"is not JSON: {error}")
        if not isinstance(record, dict):
            return BadDocument(where, f"is not a JSON object but {type(record).__name__}")
        return self.from_mapping(record, where)

    def from_mapping(self, record: Mapping[str, Any], where: str) -> str | BadDocument:
        if self._template is None:
            text = record.get(self.text_key)
            if not isinstance(text, str):
                return BadDocument(where, self._no_text(record))
        else:
            try:
                text = self._template.render(record)
            except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
                return BadDocument(where, f"does not fit the template: {error}")
        return self.from_text(text, where)

    def _no_text(self, record: Mapping[str, Any]) -> str:
        if self.text_key in record:
            return f"has {_word(record[self.text_key])} under text_key = {self.text_key!r}, but must have text there"
        found = ", ".join(map(repr, list(record)[:8])) or "none"
        return f"has no text under text_key = {self.text_key!r}; its keys: {found}"

    def from_text(self, text: str, where: str) -> str | BadDocument:
        if not text or text.isspace():
            return BadDocument(where, "is an empty document")
        if len(text) > self.max_bytes:
            return self.too_large(len(text), where)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair, which UTF-8 cannot encode
                return BadDocument(where, f"is not valid Unicode ({error.reason})")
        return text

    def too_large(self, size: int, where: str) -> BadDocument:
        return BadDocument(where, f"is a document of {size:,} bytes, more than max_document_bytes = {self.max_bytes:,}")
