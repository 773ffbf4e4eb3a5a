"""What a vocabulary can be extended from: another one, with the tokens of several digits taken out.

Qwen's vocabulary is made this way (arXiv:2309.16609 section 2.2): cl100k_base without the 1,100 tokens that hold more
than one of the digits 0 to 9 (all of them are numbers of two or three digits) is, in the same order, the first 99,156
tokens of qwen.tiktoken. Full-width digits do not count: "１０" and "２０" are in both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import regex

from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.files import read_bytes
from jaxllm.tokenizers.rank_file import parse_tokens
from jaxllm.tokenizers.tiktoken_bpe import QWEN_FILE, RANKS_FILE, TiktokenBPE
from jaxllm.tokenizers.train import Base


def read_base(path: str | PathLike[str]) -> Base:
    """Read a tokenizer, or a bare file of ranks such as cl100k_base.tiktoken, as the base of a new vocabulary.

    A bare file says nothing about pattern and special tokens: these become Qwen's pattern, NFC and `CHAT_SPECIALS`.

    Raises:
      InputError: nothing lies there, it is faulty, or it is not byte-level BPE.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".tiktoken" and path.name not in (RANKS_FILE, QWEN_FILE):
        return Base(tokens=parse_tokens(read_bytes(path), path))
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, TiktokenBPE):
        raise InputError(f"{path}: only a byte-level BPE vocabulary can be extended")
    for field in ("first_patterns", "absent_bytes", "added_tokens", "decode_only"):
        if getattr(tokenizer, field):
            raise InputError(f"{path}: a tokenizer with {field} cannot be extended: training would not apply them")
    return Base(
        tokens=tokenizer.tokens,
        pattern=tokenizer.pattern,
        normalization=tokenizer.normalization,
        special_tokens=sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        raw_tokens=tokenizer.raw_tokens,
        prefix_tokens=tokenizer.prefix_tokens,
        suffix_tokens=tokenizer.suffix_tokens,
    )


def without_multi_digit_tokens(base: Base) -> Base:
    """Take out the tokens of several digits, and let the pattern cut digits apart.

    Raises:
      InputError: the pattern keeps digits together in another way than cl100k's does.
    """
    tokens = [token for token in base.tokens if not has_several_digits(token)]
    return dataclasses.replace(base, tokens=tokens, pattern=_cut_digits(base.pattern))


def with_special_tokens(base: Base, texts: Sequence[str]) -> Base:
    """Append special tokens; raises InputError for one that is there already, or comes twice."""
    special_tokens = [*base.special_tokens, *texts]
    for text in texts:
        if special_tokens.count(text) > 1:
            raise InputError(f"special token {text!r}: found twice, expected a new one")
    return dataclasses.replace(base, special_tokens=special_tokens)


def has_several_digits(token: bytes) -> bool:
    """Tell whether a token holds more than one of the digits 0 to 9."""
    return len(re.findall(rb"[0-9]", token)) > 1


def _cut_digits(pattern: str) -> str:
    """Replace cl100k's runs of up to three digits by single ones, which is all that tells Qwen's pattern from it."""
    single = re.sub(r"\\p\{N\}\{1,3\}\+?", lambda _: r"\p{N}", pattern)
    pieces = [match.group() for match in regex.finditer(single, "1234 a56")]
    if any(has_several_digits(piece.encode()) for piece in pieces):
        raise InputError(f"pattern: {pattern!r} keeps digits together, so tokens of several digits would come back")
    return single
