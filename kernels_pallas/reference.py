"""The oracles: the kernels' functions in plain jax.numpy, with scores for every pair; float64 in, float64 computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.visible import NOTHING_SEEN, visible


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int | jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    query_start: int | jax.Array = 0,
    impl: str | None = None,
    interpret: bool = False,
    block_sizes: object = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return softmax(scores) v by materialising the scores; see kernels_pallas.flash_attention for the arguments."""
    del impl, interpret, block_sizes
    (batch, length, num_heads, head_dim), (slots, num_kv_heads) = q.shape, k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=wide, precision="highest")
    scores = scores.reshape(batch, num_heads, length, slots)
    scores *= head_dim**-0.5 if softmax_scale is None else softmax_scale
    if query_scale is not None:
        scores *= query_scale.astype(wide)[:, None, :, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    slots_apart = query_start + jnp.arange(length)[:, None] - jnp.arange(slots)[None]
    if alibi_slopes is not None:
        slopes = jax.lax.stop_gradient(alibi_slopes).astype(wide)
        scores -= slopes[None, :, None, None] * jnp.abs(slots_apart).astype(wide)[None, None]
    key_segments = segment_ids if kv_segment_ids is None else kv_segment_ids
    sees = visible(
        slots_apart[None],
        causal=causal,
        window=window,
        query_segments=None if segment_ids is None else segment_ids[:, :, None],
        key_segments=None if segment_ids is None else key_segments[:, None],
        prefix=None if prefix_mask is None else prefix_mask[:, None],
    )
    sees = jnp.ones((), bool) if sees is None else sees[:, None]
    weights, lse = _softmax(scores, sees)
    weights = weights.astype(v.dtype).reshape(batch, num_kv_heads, num_heads // num_kv_heads, length, slots)
    attended = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=wide, precision="highest")
    attended = attended.reshape(batch, length, num_heads, v.shape[-1]).astype(q.dtype)
    return (attended, lse) if return_lse else attended


def _softmax(scores: jax.Array, sees: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights and the log-sum-exp of the last axis; where nothing is seen: zeros and NOTHING_SEEN."""
    sees = jnp.broadcast_to(sees, scores.shape)
    scores = jnp.where(sees, scores, NOTHING_SEEN)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(sees, jnp.exp(scores - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, peak + jnp.log(total), NOTHING_SEEN)
    return weights / total, lse[..., 0]


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array | None,
    lengths: jax.Array,
    *,
    window: int | jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    query_rope: jax.Array | None = None,
    key_rope: jax.Array | None = None,
    layer: int | jax.Array | None = None,
    impl: str | None = None,
    interpret: bool = False,
    block_size: int | None = None,
) -> jax.Array:
    """Return softmax(scores) v of the whole cache; see kernels_pallas.decode_attention for the arguments."""
    del impl, interpret, block_size
    if layer is not None:
        k_cache, v_cache, key_rope = (
            cache if cache is None else jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
            for cache in (k_cache, v_cache, key_rope)
        )
    v_cache = k_cache if v_cache is None else v_cache
    (batch, num_heads, head_dim), (slots, num_kv_heads) = q.shape, k_cache.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def product(q: jax.Array, k: jax.Array) -> jax.Array:
        grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, q.shape[-1])
        k = jnp.broadcast_to(k, (batch, slots, num_kv_heads, k.shape[-1]))
        scores = jnp.einsum("BKGH,BSKH->BKGS", grouped, k, preferred_element_type=wide, precision="highest")
        return scores.reshape(batch, num_heads, slots)

    scores = product(q, k_cache) if query_rope is None else product(q, k_cache) + product(query_rope, key_rope)
    scores *= head_dim**-0.5 if softmax_scale is None else softmax_scale
    if query_scale is not None:
        scores *= query_scale.astype(wide)[:, None, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = lengths[:, None] - 1 - jnp.arange(slots, dtype=jnp.int32)[None]
    if alibi_slopes is not None:
        scores -= alibi_slopes.astype(wide)[None, :, None] * jnp.abs(distance).astype(wide)[:, None]
    sees = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if segment_ids is not None:
        sees &= segment_ids != 0
    weights, _ = _softmax(scores, sees[:, None])
    weights = weights.astype(v_cache.dtype).reshape(batch, num_kv_heads, num_heads // num_kv_heads, slots)
    attended = jnp.einsum("BKGS,BSKH->BKGH", weights, v_cache, preferred_element_type=wide, precision="highest")
    return attended.reshape(batch, num_heads, v_cache.shape[-1]).astype(q.dtype)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    expected_rows: int | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply all rows by all matrices and keep each row's own; see kernels_pallas.grouped_matmul."""
    del expected_rows, impl, interpret
    wide = jnp.promote_types(x.dtype, jnp.float32)
    ends = jnp.cumsum(group_sizes)[:, None]
    row = jnp.arange(x.shape[0])[None]
    member = (row >= ends - group_sizes[:, None]) & (row < ends)
    products = jnp.einsum("MD,EDF->EMF", x, w, preferred_element_type=wide, precision="highest")
    return jnp.sum(jnp.where(member[..., None], products, 0), axis=0).astype(x.dtype)
