"""Who may attend to whom."""

from __future__ import annotations

import jax


def attention_mask(
    query_slots: jax.Array,
    key_slots: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    prefix: jax.Array | None = None,
) -> jax.Array:
    """Return bool [B, T, S]: causal and within one document, whose prefix all of its tokens see.

    Args:
      query_slots, key_slots: int [T] and [S], places in the row; causality is by place.
      query_segments, key_segments: int [B, T] and [B, S]; 0 is padding, which nothing attends to.
      prefix: bool [B, S], keys that earlier queries see too.
    """
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] != 0)
    visible = query_slots[None, :, None] >= key_slots[None, None, :]
    if prefix is not None:
        visible = visible | prefix[:, None, :]
    return same & visible
