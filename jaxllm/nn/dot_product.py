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
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=wide) * head_dim**-0.5
    if query_scale is not None:
        scores = scores * query_scale[:, None, None, :, None]
    # Added, not selected: the backward pass then needs no mask.
    scores += jnp.where(mask, 0, 0.7 * jnp.finfo(wide).min).astype(wide)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    attended = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(batch, length, num_heads, value.shape[-1])
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], attended, 0)
