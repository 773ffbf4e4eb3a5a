"""Regular expressions that cut text into pieces, and what tokenizer.json and GGUF files say about them.

Those files may name several patterns: each cuts the pieces that the ones before left, and what it does not match stays
as pieces too. tiktoken runs one pattern, so the known sequences have one that does the same; others are run one by one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

import regex

from jaxllm.errors import InputError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
QWEN = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
"""cl100k_base's pattern, but digits stand alone (arXiv:2309.16609 section 2.2)."""

DIGITS_GPT2 = (r"\p{N}", GPT2)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# Nothing may match across an end of a piece. So each class leaves out what the earlier patterns took, and "no more
# text follows" becomes "nothing that belongs to this piece follows".
_DIGITS_GPT2_AT_ONCE = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_HAN_KANA = "一-龥\u3040-ゟ゠-ヿ"
_IN_HAN_KANA = (
    rf"[[{_HAN_KANA}]--[\p{{L}}\p{{P}}\p{{S}}]]?[[{_HAN_KANA}]&&[\p{{L}}\p{{M}}]]+"
    rf"|[[{_HAN_KANA}]&&[\p{{P}}\p{{S}}]]+"
)
_DEEPSEEK_V3_AT_ONCE = (
    rf"\p{{N}}{{1,3}}|{_IN_HAN_KANA}|(?:(?!{_IN_HAN_KANA})[{_HAN_KANA}])+"
    r"""|[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_HAN_KANA}]?[[\p{{L}}\p{{M}}]--[{_HAN_KANA}]]+"
    rf"| ?[[\p{{P}}\p{{S}}]--[{_HAN_KANA}]]+[\r\n]*"
    rf"|\s*[\r\n]+|\s+(?![^\s\p{{N}}{_HAN_KANA}])|\s+"
)
_AT_ONCE = {DIGITS_GPT2: _DIGITS_GPT2_AT_ONCE, DEEPSEEK_V3: _DEEPSEEK_V3_AT_ONCE}


def at_once(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return patterns that cut text into the same pieces: one where that is known, else the ones given."""
    combined = _AT_ONCE.get(tuple(patterns))
    return tuple(patterns) if combined is None else (combined,)


def covering(pattern: str) -> str:
    """Let what a pattern does not match be a piece too; tiktoken would leave it out."""
    return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"


class Splitter:
    """Cuts pieces by one pattern; words that come again and again are looked up."""

    MAX_WORD = 32
    MAX_WORDS = 65_536

    def __init__(self, pattern: str):
        """Compile the pattern; raises InputError where it does not compile or captures groups."""
        try:
            self._pattern = regex.compile(f"({pattern})")
        except regex.error as error:
            raise InputError(f"pattern: {pattern!r} does not compile: {error}") from error
        if self._pattern.groups > 1:
            raise InputError(f"pattern: {pattern!r} captures groups, which one of several patterns may not")
        self._cut_word = functools.lru_cache(self.MAX_WORDS)(self._cut)

    def cut(self, pieces: Iterable[str]) -> list[str]:
        """Return the matches of the pattern in each piece and what lies between them, in order."""
        cut = [self._cut_word(piece) if len(piece) <= self.MAX_WORD else self._cut(piece) for piece in pieces]
        return list(itertools.chain.from_iterable(cut))

    def _cut(self, piece: str) -> list[str]:
        return [found for found in self._pattern.split(piece) if found]


def portable(pattern: str, where: str) -> str:
    """Return a pattern of the tokenizers library (Oniguruma) in a form that all engines here read alike.

    Raises:
      InputError: it uses what the engines disagree about; `where` names the pattern.
    """
    in_class, ends_line = False, False
    for match in regex.finditer(r"\\.|\[:|&&|--|~~|\|\||[\[\]^$]", pattern, flags=regex.DOTALL):
        found = match.group()
        if found in ("[", "]"):
            understood = in_class == (found == "]")
            in_class = found == "["
        elif found == "$":
            understood = True
            ends_line = ends_line or not in_class
        elif found == "^":
            understood = in_class
        elif found[0] == "\\":
            understood = not found[1].isalnum() or found[1] in "sSpPrnt"
        else:
            understood = not in_class and found != "[:"
        if not understood:
            raise InputError(f"{where}: {found!r} at character {match.start()} of {pattern!r} is not understood")
    # Oniguruma's $ is the end of a line, elsewhere only the end of the text.
    return f"(?m:{pattern})" if ends_line else pattern
