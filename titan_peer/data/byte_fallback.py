"""Tokenizers that write characters outside their vocabulary as bytes, one token per byte (Llama 2, Mistral, Gemma).

The `tokenizers` library decodes a run of such tokens as a whole: one incomplete or wrong character anywhere in it, and every
byte of the run becomes a replacement character. A completion that is still growing, or was cut by its length, is then lost
up to the last token that is no byte. Here only the broken character becomes one, as with byte-level tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers


class ByteRuns:
    """The byte tokens of a tokenizer; none if its decoder does not make bytes of them.

    Args:
        tokenizer: is not kept up to date with tokens added later.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        letter = ids[ord("A")]
        is_decoded = letter is not None and tokenizer.decode([letter]) == "A"
        self._byte_of = {i: byte for byte, i in enumerate(ids) if i is not None} if is_decoded else {}
        self._id_of = {byte: i for i, byte in self._byte_of.items()}
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def mended(self, ids: Sequence[int]) -> list[int]:
        """Ids of the same text in which every run of byte tokens is UTF-8: U+FFFD stands for each broken character."""
        if self._byte_of.keys().isdisjoint(ids):
            return list(ids)
        mended: list[int] = []
        run = bytearray()
        for i in ids:
            if i in self._byte_of:
                run.append(self._byte_of[i])
            elif i not in self._special and self._tokenizer.id_to_token(i) is not None:  # others leave no text
                mended += self._ids_of(run)
                mended.append(i)
                run.clear()
        return mended + self._ids_of(run)

    def _ids_of(self, run: bytearray) -> list[int]:
        valid = run.decode(errors="replace").encode()
        # a vocabulary without the bytes of U+FFFD keeps the run as it is
        if not all(byte in self._id_of for byte in valid):
            valid = bytes(run)
        return [self._id_of[byte] for byte in valid]
