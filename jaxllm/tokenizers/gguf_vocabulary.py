"""Tokenizers from the metadata of GGUF files (keys "tokenizer.ggml.*", named as in the GGUF specification)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import InputError
from jaxllm.tokenizers import patterns
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.byte_level import read_vocabulary
from jaxllm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from jaxllm.tokenizers.sentencepiece_proto import Piece, build_bpe_model
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4

# llama.cpp's default; it keeps what a pattern does not match as a piece, too.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", patterns.GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (patterns.GPT2,),
    "smollm": patterns.DIGITS_GPT2,
    "starcoder": patterns.DIGITS_GPT2,
    "refact": patterns.DIGITS_GPT2,
    "llama-bpe": (patterns.CL100K,),
    "llama3": (patterns.CL100K,),
    "llama-v3": (patterns.CL100K,),
    "glm4": (patterns.CL100K,),
    "chatglm-bpe": (patterns.CL100K,),
    "qwen2": (patterns.QWEN,),
    "deepseek-v3": patterns.DEEPSEEK_V3,
}
"""Patterns by the name in "tokenizer.ggml.pre"."""

WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3")
"""Names that say, too, that a piece which is a token becomes that token, whatever the merges make of it."""


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Args:
      fields: the file's metadata, name -> Python value; other names than "tokenizer.ggml.*" are not looked at.

    Raises:
      InputError: a field is missing or faulty, or a kind of tokenizer that is not understood.
    """
    kind = fields.get(f"{PREFIX}model")
    if kind == "gpt2":
        return _byte_level(fields)
    if kind == "llama":
        return _sentencepiece(fields)
    raise InputError(f"{PREFIX}model: found {kind!r}, expected 'gpt2' or 'llama'")


def _byte_level(fields: Mapping[str, Any]) -> TiktokenBPE:
    tokens, kinds = _tokens_and_kinds(fields)
    pre = fields.get(f"{PREFIX}pre", "default")
    if pre not in PATTERNS:
        raise InputError(f"{PREFIX}pre: found {pre!r}, expected one of {', '.join(PATTERNS)}")
    merges = [tuple(merge.split(" ")) for merge in _need(fields, "merges", list)]
    for step, merge in enumerate(merges):
        if len(merge) != 2:
            raise InputError(f"{PREFIX}merges[{step}]: found {' '.join(merge)!r}, expected two tokens")
    bos, eos, pad = (_token(fields, name, tokens) for name in ("bos", "eos", "padding"))
    special = {text: k for k, text in enumerate(tokens) if kinds[k] == CONTROL or text in (bos, eos, pad)}
    added = {text: k for k, text in enumerate(tokens) if kinds[k] == USER_DEFINED and text not in special}
    vocabulary = read_vocabulary(
        {text: k for k, text in enumerate(tokens)},
        merges,
        fixed=special.keys() | added.keys(),
        whole_pieces=pre in WHOLE_PIECES,
        fields=(f"{PREFIX}tokens", f"{PREFIX}merges"),
    )
    *first, last = patterns.at_once(PATTERNS[pre])
    add_bos = fields.get(f"{PREFIX}add_bos_token", pre in WHOLE_PIECES)
    return TiktokenBPE(
        vocabulary.tokens,
        ids=vocabulary.ids,
        decode_only=vocabulary.decode_only,
        absent_bytes=vocabulary.absent_bytes,
        first_patterns=first,
        pattern=last,
        normalization=None,
        special_tokens=special,
        added_tokens=added,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        prefix_tokens=(bos,) if add_bos and bos is not None else (),
    )


def _sentencepiece(fields: Mapping[str, Any]) -> SentencePieceTokenizer:
    tokens, kinds = _tokens_and_kinds(fields)
    scores = _need(fields, "scores", list)
    if len(scores) != len(tokens):
        raise InputError(f"{PREFIX}scores: found {len(scores):,} entries, expected {len(tokens):,} as in tokens")
    names = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
    texts = {name: _token(fields, name, tokens) for name in names.values()}
    pieces = [Piece(text, score, kind) for text, score, kind in zip(tokens, scores, kinds, strict=True)]
    content = build_bpe_model(
        pieces,
        {short: fields.get(f"{PREFIX}{name}_token_id", -1) for short, name in names.items()},
        add_dummy_prefix=fields.get(f"{PREFIX}add_space_prefix", True),
    )
    add_bos = fields.get(f"{PREFIX}add_bos_token", True) and texts["bos"] is not None
    return SentencePieceTokenizer(
        content,
        bos_token=texts["bos"],
        eos_token=texts["eos"],
        pad_token=texts["padding"],
        prefix_tokens=(texts["bos"],) if add_bos else (),
    )


def _tokens_and_kinds(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens, kinds = _need(fields, "tokens", list), _need(fields, "token_type", list)
    if len(kinds) != len(tokens):
        raise InputError(f"{PREFIX}token_type: found {len(kinds):,} entries, expected {len(tokens):,} as in tokens")
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{PREFIX}tokens: found a token twice, expected {len(tokens):,} different ones")
    return tokens, kinds


def _token(fields: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    """Return the text of a token that the file names by its id, or None where it names none."""
    key = f"{PREFIX}{name}_token_id"
    if key not in fields:
        return None
    if type(fields[key]) is not int or not 0 <= fields[key] < len(tokens):
        raise InputError(f"{key}: found {fields[key]!r}, expected an id from 0 to {len(tokens) - 1:,}")
    return tokens[fields[key]]


def _need(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    found = fields.get(f"{PREFIX}{name}")
    if not isinstance(found, kind):
        raise InputError(f"{PREFIX}{name}: found {type(found).__name__}, expected {kind.__name__}")
    return found
