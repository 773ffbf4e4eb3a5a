"""Who may attend to whom."""

from __future__ import annotations

import jax


def attention_mask(
    distance: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    prefix: jax.Array | None = None,
    window: jax.Array | None = None,
) -> jax.Array:
    """Return bool [B, T, S]: causal and within one document, whose prefix all of its tokens see.

    Args:
      distance: int [T, S], the query's place in the row less the key's; causality is by place.
      query_segments, key_segments: int [B, T] and [B, S]; 0 is padding, which nothing attends to.
      prefix: bool [B, S], keys that all queries see, whatever order and window.
      window: int [], queries see only keys at a distance below it; None: all.
    """
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] != 0)
    visible = (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None]
    if prefix is not None:
        visible = visible | prefix[:, None, :]
    return same & visible
