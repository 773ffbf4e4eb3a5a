"""Flash attention for TPU: the backward pass, in as many chunks of keys as vector memory needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.flash_tpu_gradients import Queries, compute_gradients
from kernels_pallas.flash_tpu_tiles import LANES, default_block_sizes, vmem_limit
from kernels_pallas.options import LOG2_E, Options
from kernels_pallas.visible import Masks


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_scale: jax.Array | None,
    slopes: jax.Array | None,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    delta: jax.Array,
    masks: Masks,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (dq, dk, dv); the arguments are described in flash_attention."""
    del o
    queries = Queries(q, do, lse * LOG2_E, delta, query_scale)
    dq_dtype = q.dtype if query_scale is None else jnp.float32
    blocks = _blocks(q, k, masks, options)
    slots, chunk = k.shape[1], _chunk(q, k, v, blocks, options)
    if slots <= chunk:
        return compute_gradients(queries, k, v, slopes, masks, options, blocks, dq_dtype)
    if masks.key_segments is None:
        segments = jnp.ones((q.shape[0], q.shape[1]), jnp.int32), jnp.ones((q.shape[0], slots), jnp.int32)
        masks = masks._replace(query_segments=segments[0], key_segments=segments[1])

    def add(dq: jax.Array, part: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, k, v, key_segments, prefix = part
        here = masks._replace(key_segments=key_segments, prefix=prefix, query_start=masks.query_start - start)
        dq_part, dk, dv = compute_gradients(queries, k, v, slopes, here, options, blocks, jnp.float32)
        return dq + dq_part, (dk, dv)

    starts = jnp.arange(0, slots, chunk, dtype=jnp.int32)
    parts = jax.tree.map(lambda x: _cut(x, chunk), (k, v, masks.key_segments, masks.prefix))
    dq, dk_dv = jax.lax.scan(add, jnp.zeros(q.shape, jnp.float32), (starts, *parts))
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :slots] for x in dk_dv)
    return dq.astype(dq_dtype), dk, dv


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """Cut [B, S, ...] into chunks of S, the last one padded with zeros: [chunks, B, chunk, ...]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0) for _ in x.shape[2:])))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _blocks(q: jax.Array, k: jax.Array, masks: Masks, options: Options) -> tuple[int, int]:
    if options.block_sizes is not None:
        return options.block_sizes.dkv
    queries, keys = default_block_sizes(q.shape[-1], masks).dkv
    # The queries of all heads of a group are in vector memory at once.
    group = q.shape[2] // k.shape[2]
    return max(LANES, min(queries, 8192 // group // LANES * LANES)), keys


def _chunk(q: jax.Array, k: jax.Array, v: jax.Array, blocks: tuple[int, int], options: Options) -> int:
    """Return how many keys' gradients to hold at once, a multiple of the key block."""
    queries, keys = blocks
    if options.block_sizes is not None and options.block_sizes.chunk is not None:
        return max(options.block_sizes.chunk // keys, 1) * keys
    width = sum(x.shape[-1] + -x.shape[-1] % LANES for x in (k, v))
    # Blocks have two buffers; sums are float32. A quarter is left for a tile's scores.
    held = q.shape[2] // k.shape[2] * queries * width * (2 * 2 * q.dtype.itemsize + 4)
    room = vmem_limit(options) * 3 // 4 - held
    return max(room // (width * (2 * k.dtype.itemsize + 4)) // keys, 1) * keys
