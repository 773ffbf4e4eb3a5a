"""Which merge makes each token of a byte-level BPE vocabulary: what a list of ranks does not say by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxllm.tokenizers.merge_ranks import Merge


def merges_of(tokens: Sequence[bytes]) -> dict[bytes, Merge]:
    """Return the merge that makes each token of two bytes or more, in the order of the ranks.

    One merge is enough for a token: where its bytes end as one token inside a text, they were merged with each other
    alone, hence in the same order as here, where they stand alone. A token that is absent from the result cannot be
    reached by merging; encoders give it only to a piece that equals it.

    Args:
      tokens: distinct byte strings in the order of merging.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = {token: last_merge(token, ranks) for token in tokens if len(token) > 1}
    return {token: merge for token, merge in merges.items() if merge is not None}


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> Merge | None:
    """Merge the bytes of a token as an encoder does; return the last two parts, or None where others are left."""
    none = len(ranks)
    parts = [token[k : k + 1] for k in range(len(token))]
    pairs = [ranks.get(token[k : k + 2], none) for k in range(len(token) - 1)]
    while len(parts) > 2:
        lowest = min(pairs)
        if lowest == none:
            return None
        k = pairs.index(lowest)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]
        del pairs[k]
        for left in range(max(k - 1, 0), min(k + 1, len(pairs))):
            pairs[left] = ranks.get(parts[left] + parts[left + 1], none)
    return (parts[0], parts[1])


def unreachable(tokens: Sequence[bytes]) -> list[bytes]:
    """Return the tokens of two bytes or more that no merge makes."""
    merges = merges_of(tokens)
    return [token for token in tokens if len(token) > 1 and token not in merges]
