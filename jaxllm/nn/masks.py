"""Who may attend to whom."""

from __future__ import annotations

import jax


def attention_mask(
    query_slots: jax.Array,
    key_slots: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    """Return bool [B, T, S]: causal and within one document.

    Args:
      query_slots, key_slots: int [T] and [S], places in the row; causality is by place.
      query_segments, key_segments: int [B, T] and [B, S]; 0 is padding, which nothing attends to.
    """
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] != 0)
    return same & (query_slots[None, :, None] >= key_slots[None, None, :])
