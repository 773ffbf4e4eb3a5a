"""Cutting tokens with a fixed text (special and added ones) out of a text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import regex


class TokenCutter:
    """Finds tokens in a text: of two that overlap the one that begins first, of two that begin together the longer."""

    def __init__(self, tokens: Mapping[str, int]):
        """Build the cutter for `tokens`, text -> id."""
        self._ids = dict(tokens)
        self._first = {text[0] for text in tokens}
        initials = "".join(map(regex.escape, sorted(self._first)))
        # The look-ahead passes over most characters faster than the list does.
        self._find = regex.compile(rf"(?=[{initials}])\L<tokens>", tokens=list(tokens)) if tokens else None

    def cut(self, text: str, *, passed_over: Collection[str] = ()) -> Iterator[str | int]:
        """Yield the text in order, tokens as ids and what lies between as non-empty texts.

        Args:
          passed_over: tokens that stay text. They still keep others from being found inside them, as in the
            tokenizers library with encode_special_tokens.
        """
        begin = 0
        if self._find is not None and any(initial in text for initial in self._first):
            for match in self._find.finditer(text):
                if match.group() in passed_over:
                    continue
                if begin < match.start():
                    yield text[begin : match.start()]
                yield self._ids[match.group()]
                begin = match.end()
        if begin < len(text):
            yield text[begin:]
