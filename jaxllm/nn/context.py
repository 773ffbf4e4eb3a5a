"""What all layers of one call share, from the batch and the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.nn.attention import AttentionContext
from jaxllm.nn.dot_product import AttentionImpl, Visibility
from jaxllm.nn.position import RopeTables, alibi_slopes, logn_scale, rope_tables
from jaxllm.spec import Alibi, DynamicNTK, ModelSpec, Rope, Rope2D
from jaxllm.types import Batch, KVCache


def append_slots(cache: KVCache, batch: Batch) -> KVCache:
    """Note the batch's segments and positions in the slots that its tokens will fill."""
    start = (0, cache.index)
    return cache.replace(
        segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, batch.segment_ids, start),
        positions=jax.lax.dynamic_update_slice(cache.positions, batch.positions, start),
    )


def attention_context(
    spec: ModelSpec, batch: Batch, cache: KVCache | None, train: bool, impl: AttentionImpl
) -> AttentionContext:
    """Return the rotations, visibility and scales of a batch's tokens; `cache` has their slots already."""
    rope, key_rope = _rope(spec, batch, cache, train)
    return AttentionContext(
        rope=rope,
        key_rope=key_rope,
        visibility=_visibility(spec, batch, cache, impl),
        alibi_slopes=jnp.asarray(alibi_slopes(spec.attention.num_heads)) if isinstance(spec.position, Alibi) else None,
        query_scale=None if spec.logn is None or train else logn_scale(spec.logn, batch.positions),
        index=None if cache is None else cache.index,
        impl=impl,
    )


def _visibility(spec: ModelSpec, batch: Batch, cache: KVCache | None, impl: AttentionImpl) -> Visibility:
    key_segments = batch.segment_ids if cache is None else cache.segment_ids
    num_slots = key_segments.shape[1]
    visibility = Visibility(
        segment_ids=batch.segment_ids,
        key_segment_ids=key_segments,
        start=jnp.int32(0) if cache is None else cache.index,
        prefix=None if batch.prefix_mask is None else _fit(batch.prefix_mask, num_slots),
        mask=None if batch.mask is None else _fit(batch.mask, num_slots) & (key_segments != 0)[:, None, :],
    )
    if impl == "reference" and spec.window is None:
        # Once for all layers.
        return visibility.replace(mask=visibility.dense(None))
    return visibility


def _fit(visible: jax.Array, num_slots: int) -> jax.Array:
    """Widen a mask over the batch's tokens to the slots of a cache whose first ones they are."""
    return jnp.pad(visible, [(0, 0)] * (visible.ndim - 1) + [(0, num_slots - visible.shape[-1])])


def _rope(
    spec: ModelSpec, batch: Batch, cache: KVCache | None, train: bool
) -> tuple[RopeTables | None, RopeTables | None]:
    """Return the rotations of the batch's tokens, and of all keys where the cache keeps them unrotated."""
    if not isinstance(spec.position, Rope | Rope2D):
        return None, None
    length = batch.rope_length
    if length is None:
        length = jnp.full(batch.tokens.shape[:1], batch.tokens.shape[1], jnp.int32)

    def tables(positions: jax.Array, blocks: jax.Array | None) -> RopeTables:
        return rope_tables(
            spec.position, positions, spec.rotary_dim, length=length, train=train, block_positions=blocks
        )

    scaling = spec.position.scaling if isinstance(spec.position, Rope) else None
    unrotated = cache is not None and isinstance(scaling, DynamicNTK) and scaling.cached_keys == "unrotated"
    blocks = block_positions(batch) if isinstance(spec.position, Rope2D) else None
    return tables(batch.positions, blocks), tables(cache.positions, None) if unrotated else None


def block_positions(batch: Batch) -> jax.Array:
    """Return each token's place within a block, int32 [B, T]."""
    return jnp.zeros_like(batch.positions) if batch.block_positions is None else batch.block_positions


def window_sizes(spec: ModelSpec) -> jax.Array | None:
    """Return how many slots back each layer sees, int32 [L]; None where all layers see all."""
    if spec.window is None:
        return None
    unlimited = jnp.iinfo(jnp.int32).max
    return jnp.array([unlimited if size is None else size for size in spec.window], jnp.int32)
