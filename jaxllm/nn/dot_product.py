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
    scale: float | None = None,
    query_scale: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    distance: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(scale q k^T) v with grouped key/value heads (arXiv:1706.03762 eq. 1, arXiv:2305.13245).

    Args:
      query: [B, T, N, H], key: [B, S, K, H], value: [B, S, K, Hv], with N a multiple of K.
      mask: bool [B, T, S], True = may attend. Rows that may attend to nothing give zeros.
      scale: None: 1 / sqrt(H).
      query_scale: float32 [B, T], multiplies the scores (LogN).
      alibi_slopes: float32 [N]: each head adds -slope * |distance|; distance: int32 [T, S], query less key slot.

    Returns:
      [B, T, N, Hv] in query's dtype; scores and softmax are float32.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, slots = key.shape[2], key.shape[1]
    groups = num_heads // num_kv_heads
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # The queries of a group lie side by side in one axis Q = G * T: as an axis of its own, G costs copies on CPU.
    grouped = query.reshape(batch, length, num_kv_heads, groups, head_dim)
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, groups * length, head_dim)
    scores = jnp.einsum("BKQH,BSKH->BKQS", grouped, key, preferred_element_type=wide)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    scores = scores.reshape(batch, num_kv_heads, groups, length, slots)
    if query_scale is not None:
        scores = scores * query_scale[:, None, None, :, None]
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(wide).reshape(1, num_kv_heads, groups, 1, 1)
        scores -= slopes * jnp.abs(distance).astype(wide)[None, None, None]
    # Added, not selected: the backward pass then needs no mask.
    scores += jnp.where(mask, 0, 0.7 * jnp.finfo(wide).min).astype(wide)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, groups * length, slots)
    attended = jnp.einsum("BKQS,BSKH->BKQH", weights, value)
    attended = attended.reshape(batch, num_kv_heads, groups, length, value.shape[-1])
    attended = jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(batch, length, num_heads, value.shape[-1])
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], attended, 0)
