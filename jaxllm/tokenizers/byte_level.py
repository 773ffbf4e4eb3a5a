"""GPT-2's byte-level BPE vocabularies, as tokenizer.json and GGUF files write them: tokens and merges as text.

Each byte is written as one character: the printable ones of Latin-1 as themselves, the other 68 in their order as
U+0100, U+0101, ... (so that a space is "Ġ").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from jaxllm.errors import InputError
from jaxllm.tokenizers.merge_ranks import BYTES, effective_tokens
from jaxllm.tokenizers.merges import last_merge

_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_CODES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + k): byte for k, byte in enumerate(_OTHERS)}


@dataclasses.dataclass(frozen=True)
class MergeVocabulary:
    """What TiktokenBPE needs to know about a vocabulary with merges.

    Attributes:
      tokens, ids: tokens in the order of merging, and their ids.
      decode_only: bytes -> id of the tokens that encoding never gives.
      absent_bytes: bytes without a token.
    """

    tokens: list[bytes]
    ids: list[int]
    decode_only: dict[bytes, int]
    absent_bytes: list[int]


def read_vocabulary(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    fixed: Collection[str] = (),
    whole_pieces: bool = False,
    fields: tuple[str, str],
) -> MergeVocabulary:
    """Turn a vocabulary and its merges into ranks.

    Args:
      vocabulary: token as text -> id.
      merges: pairs of tokens, the first to merge first.
      fixed: members of the vocabulary that stand for their own text and take no part in merging.
      whole_pieces: a piece that is a token becomes that token even where merging does not make it ("ignore_merges").
      fields: what errors call the vocabulary and the merges.

    Raises:
      InputError: a token that is not byte-level text, a merge of or to something that is no token, merges in an order
        that tiktoken cannot follow.
    """
    ids = {_to_bytes(text, fields[0]): token_id for text, token_id in vocabulary.items() if text not in fixed}
    pairs = [(_to_bytes(left, fields[1]), _to_bytes(right, fields[1])) for left, right in merges]
    for step, (left, right) in enumerate(pairs):
        for token in (left, right, left + right):
            if token not in ids:
                raise InputError(f"{fields[1]}[{step}]: {token!r} is not in {fields[0]}")
    merged = effective_tokens(pairs, fields[1])
    tokens = [byte for byte in BYTES if byte in ids] + merged
    known = set(tokens)
    others = [token for token in ids if token not in known]
    if whole_pieces:
        _check_whole_pieces(tokens, others, fields[0])
        tokens, others = tokens + others, []
    return MergeVocabulary(
        tokens=tokens,
        ids=[ids[token] for token in tokens],
        decode_only={token: ids[token] for token in others},
        absent_bytes=[byte[0] for byte in BYTES if byte not in ids],
    )


def _check_whole_pieces(tokens: Sequence[bytes], others: Sequence[bytes], field: str) -> None:
    """Make sure that tokens which merging does not make, once they have ranks, do not come out of merging after all.

    tiktoken joins whatever two neighbours have a rank together, so these tokens must end as three parts or more.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in others:
        if last_merge(token, ranks) is not None:
            raise InputError(f"{field}: no merge makes {token!r}, but tiktoken would; such a vocabulary cannot be read")


def _to_bytes(text: str, field: str) -> bytes:
    try:
        return bytes(_CODES[character] for character in text)
    except KeyError as error:
        raise InputError(f"{field}: {text!r} is not byte-level text: {error.args[0]!r} stands for no byte") from error
