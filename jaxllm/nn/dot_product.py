"""Scaled dot-product attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    query_scale: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(q k^T / sqrt(H)) v with grouped key/value heads (arXiv:1706.03762 eq. 1, arXiv:2305.13245).

    Args:
      query: [B, T, N, H], key and value: [B, S, K, H] with N a multiple of K.
      mask: bool [B, T, S], True = may attend. Rows that may attend to nothing give zeros.
      query_scale: float32 [B, T], multiplies the scores (LogN).

    Returns:
      [B, T, N, H] in query's dtype; scores and softmax are float32.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, slots = key.shape[2], key.shape[1]
    groups = num_heads // num_kv_heads
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # The queries of a group lie side by side in one axis Q = G * T: as an axis of its own, G costs copies on CPU.
    grouped = query.reshape(batch, length, num_kv_heads, groups, head_dim)
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, groups * length, head_dim)
    scores = jnp.einsum("BKQH,BSKH->BKQS", grouped, key, preferred_element_type=wide) * head_dim**-0.5
    scores = scores.reshape(batch, num_kv_heads, groups, length, slots)
    if query_scale is not None:
        scores = scores * query_scale[:, None, None, :, None]
    # Added, not selected: the backward pass then needs no mask.
    scores += jnp.where(mask, 0, 0.7 * jnp.finfo(wide).min).astype(wide)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, groups * length, slots)
    attended = jnp.einsum("BKQS,BSKH->BKQH", weights, value)
    attended = attended.reshape(batch, num_kv_heads, groups, length, value.shape[-1])
    attended = jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(batch, length, num_heads, value.shape[-1])
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], attended, 0)
