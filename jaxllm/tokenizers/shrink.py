"""Take tokens out of a byte-level BPE vocabulary without changing how the others are reached."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from jaxllm.errors import InputError
from jaxllm.tokenizers.merges import merges_of
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

_Name = TypeVar("_Name", str, bytes)


def with_parts(tokenizer: TiktokenBPE, ids: Iterable[int]) -> set[int]:
    """Add to some ids all that they are merged from, the single bytes, and the special and added tokens.

    A tokenizer with these ids alone (see `keep_ids`) cuts every text whose ids are among `ids` as before: merging
    such a text never touches another token.
    """
    merges = merges_of(tokenizer.tokens)
    id_of = dict(zip(tokenizer.tokens, tokenizer.ids, strict=True))
    token_of = {token_id: token for token, token_id in id_of.items()}
    kept: set[int] = set()
    waiting = [*ids, *(token_id for token, token_id in id_of.items() if len(token) == 1)]
    while waiting:
        token_id = waiting.pop()
        if token_id not in kept:
            kept.add(token_id)
            waiting.extend(id_of[part] for part in merges.get(token_of.get(token_id, b""), ()))
    return kept.union(tokenizer.special_tokens.values(), tokenizer.added_tokens.values())


def keep_ids(tokenizer: TiktokenBPE, ids: Collection[int]) -> TiktokenBPE:
    """Build the tokenizer that has these ids alone, numbered anew in their order; ids that it has not are holes.

    Raises:
      InputError: without the other ids a token could not be merged any more, a byte would have no token, or a token
        with a role (begin, end, padding, around a prompt) would be gone.
    """
    new_ids = {token_id: new_id for new_id, token_id in enumerate(sorted(ids))}

    def left(found: Mapping[_Name, int]) -> dict[_Name, int]:
        return {name: new_ids[token_id] for name, token_id in found.items() if token_id in new_ids}

    tokens = left(dict(zip(tokenizer.tokens, tokenizer.ids, strict=True)))
    for token, parts in merges_of(tokenizer.tokens).items():
        for part in parts:
            if token in tokens and part not in tokens:
                raise InputError(f"token {part!r} cannot be dropped: {token!r}, which stays, is merged from it")
    special_tokens, added_tokens = left(tokenizer.special_tokens), left(tokenizer.added_tokens)
    for field in ("bos_token", "eos_token", "pad_token", "prefix_tokens", "suffix_tokens"):
        found = getattr(tokenizer, field) or ()
        for text in (found,) if isinstance(found, str) else found:
            if text not in special_tokens:
                raise InputError(f"token {text!r} cannot be dropped: it is in the tokenizer's {field}")
    return TiktokenBPE(
        list(tokens),
        ids=list(tokens.values()),
        decode_only=left(tokenizer.decode_only),
        pattern=tokenizer.pattern,
        first_patterns=tokenizer.first_patterns,
        absent_bytes=tokenizer.absent_bytes,
        special_tokens=special_tokens,
        added_tokens=added_tokens,
        raw_tokens=[text for text in tokenizer.raw_tokens if text in special_tokens or text in added_tokens],
        normalization=tokenizer.normalization,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        prefix_tokens=tokenizer.prefix_tokens,
        suffix_tokens=tokenizer.suffix_tokens,
    )
