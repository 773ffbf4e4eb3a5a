"""Write a byte-level BPE tokenizer as tokenizer.json, the format of Hugging Face's `tokenizers` package."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.files import to_json, write_together
from jaxllm.tokenizers.merges import merges_of
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_CLASS = r"\[(?:\\.|[^\]\\])+\]"
_ATOM = rf"\\[pP]\{{\^?\w+\}}|{_CLASS}|\\[^pP]|[^\\()\[\]{{}}*+?|]"
_POSSESSIVE_INTERVAL = re.compile(rf"({_ATOM})(\{{\d+(?:,\d*)?\}})\+")


def export_tokenizer(tokenizer: Tokenizer, target: str | PathLike[str]) -> list[Path]:
    """Write tokenizer.json, all or nothing; return the files written.

    Args:
      target: a file name that ends in .json, or a folder, which gets tokenizer_config.json as well.

    Raises:
      InputError: the tokenizer is not byte-level BPE or its pattern has no equivalent; a file is there already, or
        cannot be written.
    """
    if not isinstance(tokenizer, TiktokenBPE):
        raise InputError("tokenizer.json is written for byte-level BPE only, and this tokenizer is another kind")
    target = Path(target)
    is_file = target.suffix == ".json"
    folder = target.parent if is_file else target
    paths = [target] if is_file else [folder / JSON_FILE, folder / CONFIG_FILE]
    for path in paths:
        if path.exists():
            raise InputError(f"{path}: is there already; expected a name that is free")
    contents = [to_json(tokenizer_json(tokenizer)), to_json(tokenizer_config(tokenizer))]
    write_together(folder, {path.name: content for path, content in zip(paths, contents, strict=False)})
    return paths


def tokenizer_json(tokenizer: TiktokenBPE) -> dict[str, Any]:
    """Return the content of a tokenizer.json that gives every text the ids that this tokenizer gives it.

    The one difference lies in the format: it reads the text of a special token as that token always, whereas here
    that is asked for (`allow_special`).

    Tokens that no merge makes stay in the vocabulary without a merge; `ignore_merges`, which is set where there are
    any, then gives them, as tiktoken does, to the pieces that equal them.

    Raises:
      InputError: the format cannot say the pattern or the vocabulary.
    """
    merges = merges_of(tokenizer.tokens)
    has_unreachable = any(len(token) > 1 and token not in merges for token in tokenizer.tokens)
    if has_unreachable and tokenizer.decode_only:
        raise InputError(
            "tokenizer.json: some tokens are for whole pieces, others for no piece; it has one rule for all"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id} | token for token_id, token in _fixed_tokens(tokenizer).items()],
        "normalizer": {"type": tokenizer.normalization} if tokenizer.normalization else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*map(_split, (*tokenizer.first_patterns, tokenizer.pattern)), byte_level],
        },
        "post_processor": _surrounding(tokenizer),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": has_unreachable,
            "vocab": _vocabulary(tokenizer),
            "merges": [f"{spell(left)} {spell(right)}" for left, right in merges.values()],
        },
    }


def tokenizer_config(tokenizer: TiktokenBPE) -> dict[str, Any]:
    """Return the content of the tokenizer_config.json that transformers wants beside a tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(token_id): token for token_id, token in _fixed_tokens(tokenizer).items()},
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
    }


def _fixed_tokens(tokenizer: TiktokenBPE) -> dict[int, dict[str, Any]]:
    """Return the special and added tokens by id, as both files describe them."""
    ids = tokenizer.special_tokens | tokenizer.added_tokens
    return {
        ids[text]: {
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": tokenizer.normalization is not None and text not in tokenizer.raw_tokens,
            "special": text in tokenizer.special_tokens,
        }
        for text in sorted(ids, key=ids.__getitem__)
    }


def _vocabulary(tokenizer: TiktokenBPE) -> dict[str, int]:
    ids = {spell(token): token_id for token, token_id in zip(tokenizer.tokens, tokenizer.ids, strict=True)}
    ids |= {spell(token): token_id for token, token_id in tokenizer.decode_only.items()}
    fixed = tokenizer.special_tokens | tokenizer.added_tokens
    if sorted(fixed.values()) == list(range(len(ids), len(ids) + len(fixed))):
        return ids
    # Readers number added tokens from the end of the vocabulary, unless it holds them.
    for text in fixed:
        if text in ids:
            raise InputError(
                f"tokenizer.json: the token {text!r} is there twice, with the ids {ids[text]}, {fixed[text]}"
            )
    return ids | fixed


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": oniguruma(pattern)}, "behavior": "Isolated", "invert": False}


def _surrounding(tokenizer: TiktokenBPE) -> dict[str, Any] | None:
    """Return the rule that puts special tokens around a prompt."""
    around = (*tokenizer.prefix_tokens, *tokenizer.suffix_tokens)
    if not around:
        return None

    def template(*names: str) -> list[dict[str, Any]]:
        texts = [{"Sequence": {"id": name, "type_id": 0}} for name in names]
        prefix, suffix = (
            [{"SpecialToken": {"id": text, "type_id": 0}} for text in tokens]
            for tokens in (tokenizer.prefix_tokens, tokenizer.suffix_tokens)
        )
        return [*prefix, *texts, *suffix]

    ids = tokenizer.special_tokens
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in around},
    }


def spell(token: bytes) -> str:
    """Write bytes in the alphabet of byte-level BPE files: one printable character a byte, as GPT-2 chose them."""
    return token.decode("latin-1").translate(_ALPHABET)


def _alphabet() -> dict[int, int]:
    """Map the bytes that are not printable Latin-1, in their order, to the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {byte: 0x100 + k for k, byte in enumerate(byte for byte in range(256) if byte not in printable)}


_ALPHABET = _alphabet()


def oniguruma(pattern: str) -> str:
    r"""Translate a pattern from tiktoken's regular expressions to Oniguruma's, with which tokenizer.json is read.

    Two things differ silently: `x{1,3}+` is possessive in tiktoken but `(x{1,3})+` in Oniguruma, and `$` is the end
    of the text in tiktoken but of a line in Oniguruma.

    Raises:
      InputError: a possessive interval after a group, an anchor other than `$` at the end of a branch, flags other
        than `i`, or a class made of others by a set operation.
    """
    translated = _POSSESSIVE_INTERVAL.sub(r"(?>\1\2)", pattern)
    translated = re.sub(r"(?<!\\)\$(?=[|)]|$)", r"\\z", translated)
    outside_classes = re.sub(rf"\\.|{_CLASS}", "", translated)
    found = re.search(r"\{\d+(?:,\d*)?\}\+|[$^]|\(\?(?!i?:|[=!>]|<[=!])", outside_classes)
    found = found or re.search(r"--|&&|~~|\|\|", "".join(re.findall(_CLASS, translated)))
    if found:
        raise InputError(f"pattern: {found.group()!r} in {pattern!r} means something else in tokenizer.json")
    return translated
