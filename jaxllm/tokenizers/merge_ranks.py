"""From a list of merges to ranks that tiktoken joins in the same way.

A list of merges (tokenizer.json, GGUF) joins, step by step, those neighbours in a piece that stand first in the list;
tiktoken those whose joined bytes have the lowest rank; both from the left. They agree for the following reason.

As long as nothing was joined across the two ends of a stretch of bytes, the steps inside it are those of the stretch
alone. So where neighbours (x, y) join to the bytes of a token, they are what these bytes alone look like one step
before their end. That makes at most one merge of each token the *effective* one: the merge whose parts, side by side,
are reached with nothing joined across the seam. Other merges of the token (files made from ranks list all of them)
never happen, and neighbours that join to its bytes are always the parts of the effective merge. Hence numbering the
tokens by their effective merges gives tiktoken the same choice at each step, and a token without one is never made.

This takes for granted that the effective merges of a token's parts stand before its own, so that going through the
list once, in order, is the same as asking for the first merge at each step. A list that needs a part before it is made
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxllm.errors import InputError

Merge = tuple[bytes, bytes]
BYTES = tuple(bytes([byte]) for byte in range(256))


def effective_tokens(merges: Sequence[Merge], field: str = "merges") -> list[bytes]:
    """Return the tokens that a list of merges can make, in the order in which tiktoken must rank them.

    Args:
      merges: pairs of tokens, the first to merge first.
      field: what errors call them.

    Raises:
      InputError: a token whose merge needs a part that only a later merge makes.
    """
    steps = dict.fromkeys(BYTES, -1)
    parts: dict[bytes, Merge] = {}
    too_early: list[int] = []
    for step, (left, right) in enumerate(merges):
        token = left + right
        if token in steps:
            continue
        if left not in steps or right not in steps:
            too_early.append(step)
        elif not _joined_across(left, right, step, steps, parts):
            steps[token] = step
            parts[token] = (left, right)
    for step in too_early:
        left, right = merges[step]
        if left + right not in steps and left in steps and right in steps:
            late = max(left, right, key=steps.__getitem__)
            raise InputError(f"{field}[{step}]: needs the token {late!r}, which only {field}[{steps[late]}] makes")
    return list(parts)


def _joined_across(
    left: bytes, right: bytes, until: int, steps: Mapping[bytes, int], parts: Mapping[bytes, Merge]
) -> bool:
    """Tell whether merging the bytes of two tokens side by side joins something across the seam before step `until`.

    Walks back in time through the pairs of tokens that touch the seam. A pair lasts until one of the two is joined
    with its other neighbour. Each step goes from the left, so where that is the right one, the seam's turn is first.
    """
    while True:
        across = left + right
        if parts.get(across) == (left, right) and steps[across] < until:
            return True
        if steps[left] > steps[right]:
            until = steps[left]
            left = parts[left][1]
        elif steps[right] >= 0:
            until = steps[right] + 1
            right = parts[right][0]
        else:
            return False
