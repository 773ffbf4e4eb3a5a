"""The one rule that says which key a query may see, and the data it reads."""

from __future__ import annotations

from typing import NamedTuple

import jax

NOTHING_SEEN = -1e30
"""The log-sum-exp of a query that sees nothing: finite, so that differences and merges of them give no NaN."""


class Masks(NamedTuple):
    """What decides who sees whom, apart from causality; None: the rule has no such part."""

    query_segments: jax.Array | None = None
    """int32 [B, T], 0 = padding; given together with `key_segments`."""
    key_segments: jax.Array | None = None
    """int32 [B, S]."""
    prefix: jax.Array | None = None
    """int32 [B, S], nonzero: every query of the segment sees the key."""
    window: jax.Array | None = None
    """int32 []."""
    query_start: jax.Array | int = 0
    """int32 []: the slot of the first query; keys start at slot 0."""


def visible(
    distance: jax.Array,
    causal: bool,
    window: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
) -> jax.Array | None:
    """Return bool, True where the query sees the key, or None where every query sees every key.

    A query sees the keys of its own segment (0 is padding: it sees nobody and nobody sees it) that do not lie after it
    where `causal`, that lie less than `window` slots back and not after it, or that belong to the prefix, which
    overrides causality and window (GLM, arXiv:2103.10360).

    Args:
      distance: int32, the query's slot less the key's; the other arrays broadcast against it.
    """
    sees = None
    if causal or window is not None:
        sees = distance >= 0
        if window is not None:
            sees &= distance < window
        if prefix is not None:
            sees |= prefix != 0
    if query_segments is not None:
        same = (query_segments == key_segments) & (query_segments != 0)
        sees = same if sees is None else sees & same
    return sees
