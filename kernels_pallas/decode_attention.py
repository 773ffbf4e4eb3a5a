"""Attention of one new token per row over a key/value cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import decode_tpu, reference
from kernels_pallas.platform import implementation


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array | None,
    lengths: jax.Array,
    *,
    window: jax.Array | int | None = None,
    alibi_slopes: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    query_rope: jax.Array | None = None,
    key_rope: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    impl: str | None = None,
    interpret: bool = False,
    block_size: int | None = None,
) -> jax.Array:
    """Attend with one query per row, at slot lengths - 1, to the slots j < lengths of a cache: [B, N, Hv] in q's dtype.

    Scores, softmax and sums are float32. Rows that see nothing (length 0) give zeros. On a TPU blocks of slots in which
    a row sees nothing are not read. On a GPU it is XLA code that reads the whole cache (of stacked ones, a copy of the
    layer) and holds the scores [B, N, S], nothing larger. Not differentiable on a TPU. The cache must be finite, also
    where it is not seen.

    Args:
      q: [B, N, H]. k_cache: [B, S, K, H], N a multiple of K. v_cache: [B, S, K, Hv]; None: k_cache.
      lengths: int [B], at most S.
      window: int or int32 scalar: only the last `window` slots are seen.
      alibi_slopes: float32 [N]: adds -slope * (lengths - 1 - j). query_scale: float32 [B], times the scores (LogN).
      segment_ids: int [B, S]: slots with 0 are not seen, all others are.
      softmax_scale: None: H**-0.5. soft_cap: scores become soft_cap * tanh(scores / soft_cap), before ALiBi.
      query_rope: [B, N, R], key_rope: [B, S, 1 or K, R]: a second product that is added to the scores. Multi-head
        latent attention in the absorbed form (arXiv:2405.04434) has its latents as keys and values, K = 1, its rotary
        parts here, and a softmax_scale of its own. One head for K > 1 is repeated in memory.
      layer: int32 scalar: the caches and key_rope are stacked, [L, B, S, K, H], and this layer of them is read.
      impl: "tpu", "gpu" (XLA code), "reference"; None: by device. interpret: run the TPU kernel on a CPU.
      block_size: slots per step of the TPU kernel: S or more, or a number that, times K, is a multiple of 128 (any when
        interpreted).

    Raises:
      ValueError: an argument that does not fit the others; the message names it, what was found and expected.
    """
    parts = dict(alibi_slopes=alibi_slopes, query_scale=query_scale, segment_ids=segment_ids)
    parts |= dict(query_rope=query_rope, key_rope=key_rope)
    _check(q, k_cache, v_cache, layer, lengths=lengths, **parts)
    if implementation(impl, interpret) != "tpu":
        options = dict(window=window, softmax_scale=softmax_scale, soft_cap=soft_cap, layer=layer)
        return reference.decode_attention(q, k_cache, v_cache, lengths, **parts, **options)
    _check_kernel(q, k_cache, block_size, interpret)
    slots, kv_heads = k_cache.shape[-3:-1]
    if key_rope is not None and key_rope.shape[-2] < kv_heads:
        key_rope = jnp.broadcast_to(key_rope, (*key_rope.shape[:-2], kv_heads, key_rope.shape[-1]))
    caches = (cache if cache is None or layer is not None else cache[None] for cache in (k_cache, v_cache, key_rope))
    k_cache, v_cache, key_rope = caches
    first, end = _range(lengths, window, segment_ids, slots)
    scale = jnp.full(q.shape[0], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, jnp.float32)
    scalars = decode_tpu.Scalars(
        first=first,
        end=end,
        query_slot=lengths.astype(jnp.int32) - 1,
        layer=jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        scale=scale if query_scale is None else scale * query_scale.astype(jnp.float32),
    )
    return decode_tpu.decode(
        q,
        k_cache,
        v_cache,
        scalars,
        visible=None if segment_ids is None else segment_ids != 0,
        alibi_slopes=alibi_slopes,
        query_rope=query_rope,
        key_rope=key_rope,
        soft_cap=soft_cap,
        block_size=block_size,
        interpret=interpret,
    )


def _range(
    lengths: jax.Array, window: jax.Array | int | None, segment_ids: jax.Array | None, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Return the narrowest first <= j < end, int32 [B] each, that hold all slots seen."""
    first, end = jnp.zeros_like(lengths), jnp.minimum(lengths, slots)
    if window is not None:
        first = jnp.maximum(lengths - window, 0)
    if segment_ids is not None:
        visible = segment_ids != 0
        slot = jnp.arange(slots)[None]
        first = jnp.maximum(first, jnp.min(jnp.where(visible, slot, slots), axis=1))
        end = jnp.minimum(end, jnp.max(jnp.where(visible, slot + 1, 0), axis=1))
    return first.astype(jnp.int32), end.astype(jnp.int32)


def _check(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array | None,
    layer: jax.Array | int | None,
    **others: jax.Array | None,
) -> None:
    """Raise ValueError where shapes do not fit each other."""
    for name, array, axes in (("q", q, 3), ("k_cache", k_cache, 4 if layer is None else 5)):
        if array.ndim != axes:
            stacked = "" if layer is None else " with a layer"
            raise ValueError(f"{name}: found shape {array.shape}, expected {axes} axes{stacked}")
    (batch, num_heads, head_dim), (*stack, _, slots, kv_heads, _) = q.shape, k_cache.shape
    if num_heads % kv_heads:
        raise ValueError(f"q: found {num_heads} heads, expected a multiple of k_cache's {kv_heads}")
    if (others["query_rope"] is None) != (others["key_rope"] is None):
        raise ValueError("query_rope, key_rope: found one of them, expected both or none")
    cache = (*stack, batch, slots)
    expected = {"k_cache": (*cache, kv_heads, head_dim), "lengths": (batch,), "query_scale": (batch,)}
    expected |= {"alibi_slopes": (num_heads,), "segment_ids": (batch, slots)}
    if v_cache is not None:
        expected["v_cache"] = (*cache, kv_heads, v_cache.shape[-1])
    if others["key_rope"] is not None:
        width = others["query_rope"].shape[-1]
        rope_heads = 1 if others["key_rope"].shape[-2:-1] == (1,) else kv_heads
        expected |= {"query_rope": (batch, num_heads, width), "key_rope": (*cache, rope_heads, width)}
    found = {"k_cache": k_cache, "v_cache": v_cache, **others}
    for name, shape in expected.items():
        if found[name] is not None and found[name].shape != shape:
            raise ValueError(f"{name}: found shape {found[name].shape}, expected {shape}")


def _check_kernel(q: jax.Array, k_cache: jax.Array, block_size: int | None, interpret: bool) -> None:
    """Raise ValueError where the kernel cannot take the arguments."""
    for name, array in (("q", q), ("k_cache", k_cache)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            others = 'impl="reference" takes others'
            raise ValueError(f"{name}: found dtype {array.dtype}, expected float32 or bfloat16 ({others})")
    slots, kv_heads = k_cache.shape[-3:-1]
    if block_size is not None and not interpret and block_size < slots and block_size * kv_heads % 128:
        raise ValueError(
            f"block_size: found {block_size}, expected a number that, times {kv_heads} kv heads, is a multiple of 128"
        )
