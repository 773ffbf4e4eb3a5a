"""Cutting text into pieces and merging the bytes of each: the part of byte-level BPE that tiktoken runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import tiktoken

from jaxllm.errors import InputError
from jaxllm.tokenizers.patterns import Splitter, covering

SEPARATOR = "\uffff"
"""A code point that by definition is no character, put between pieces that were cut beforehand."""


class PieceEncoder:
    """Turns text into ranks."""

    def __init__(self, tokens: Sequence[bytes], patterns: Sequence[str], absent_bytes: Sequence[int] = ()):
        """Build the encoder.

        Args:
          tokens: distinct byte strings in the order of merging, among them all single bytes but `absent_bytes`.
          patterns: regular expressions, each of which cuts the pieces that the ones before left.
          absent_bytes: bytes without a token.

        Raises:
          InputError: a missing byte, a pattern that does not compile.
        """
        _check_single_bytes(tokens, absent_bytes)
        self._ranks = {token: rank for rank, token in enumerate(tokens)}
        self._absent = bytes(absent_bytes)
        *first, last = patterns
        self._encoding = self._build(f"[^{SEPARATOR}]+" if first else covering(last), shown=last)
        self._splitters = [Splitter(pattern) for pattern in patterns] if first else []

    def encode(self, text: str) -> np.ndarray:
        """Return ranks, uint32 [num_tokens].

        Raises:
          InputError: the text needs a byte that has no token, or is too much for a pattern.
        """
        if self._absent:
            self._refuse_absent_bytes(text)
        if not self._splitters:
            return _encode(self._encoding, text)
        pieces = [text]
        for splitter in self._splitters:
            pieces = splitter.cut(pieces)
        if SEPARATOR not in text:
            return _encode(self._encoding, SEPARATOR.join(pieces))
        return np.concatenate([_encode(self._one_piece, piece) for piece in pieces])

    @functools.cached_property
    def _one_piece(self) -> tiktoken.Encoding:
        return self._build(r"[\s\S]+", shown="")

    def _build(self, pattern: str, *, shown: str) -> tiktoken.Encoding:
        try:
            return tiktoken.Encoding("jaxllm", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={})
        except ValueError as error:
            raise InputError(f"pattern: {shown!r} does not compile: {error}") from error

    def _refuse_absent_bytes(self, text: str) -> None:
        if self._needs_absent_byte(text):
            character = next(filter(self._needs_absent_byte, text))
            raise InputError(f"the vocabulary has no token for a byte of the character U+{ord(character):04X}")

    def _needs_absent_byte(self, text: str) -> bool:
        content = text.encode()
        return len(content.translate(None, self._absent)) < len(content)


def _encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError as error:
        # For instance a million blanks before a letter: the pattern's look-ahead runs out of stack.
        raise InputError(f"text of {len(text):,} characters cannot be cut into pieces: {error}") from error


def _check_single_bytes(tokens: Sequence[bytes], absent: Sequence[int]) -> None:
    known = set(tokens)
    assert len(known) == len(tokens), "tokens are distinct"
    for byte in range(256):
        if (bytes([byte]) in known) == (byte in absent):
            found = "a" if byte in absent else "no"
            raise InputError(
                f"{found} token for the single byte 0x{byte:02x} among {len(tokens):,}; expected otherwise"
            )
