"""Tokenizers that write characters outside their vocabulary as bytes, one token per byte (Llama 2, Mistral, Gemma).

The `tokenizers` library decodes a run of such tokens as a whole: one incomplete or invalid character anywhere in the
run turns every byte of it into a replacement character. A completion that is still growing, or was cut off at its
length limit, then loses everything back to the last token that is not a byte. Here only the broken character is
replaced, as with byte-level tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers


class ByteRuns:
    """The byte tokens of a tokenizer; empty if its decoder does not turn them into bytes.

    Args:
        tokenizer: tokens that are added to it later are not taken into account.
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
        """Ids of the same text in which every run of byte tokens is valid UTF-8: each broken character becomes
        U+FFFD."""
        if self._byte_of.keys().isdisjoint(ids):
            return list(ids)
        mended: list[int] = []
        run = bytearray()
        for i in ids:
            if i in self._byte_of:
                run.append(self._byte_of[i])
            elif (
                i not in self._special and self._tokenizer.id_to_token(i) is not None
            ):  # all other ids decode to no text
                mended += self._ids_of(run)
                mended.append(i)
                run.clear()
        return mended + self._ids_of(run)

    def _ids_of(self, run: bytearray) -> list[int]:
        valid = run.decode(errors="replace").encode()
        # without tokens for the bytes of U+FFFD, the run stays as it is
        if not all(byte in self._id_of for byte in valid):
            valid = bytes(run)
        return [self._id_of[byte] for byte in valid]
