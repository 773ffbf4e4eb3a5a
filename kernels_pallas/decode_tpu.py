"""Attention of one new token per row over a key/value cache, for TPU.

All heads of a block of slots are one product: its [bs, K, H] keys count as bs * K keys, and a query sees only those of
its own kv head. That multiplies the work of products and softmax by K, but that work, N scores for each 2 * H numbers
read, hides behind the reading of the cache, and nothing is transposed. By the final schedule of the compiler
(libtpu 0.0.42, bfloat16) a block's computing takes this share of the time in which the chip's full bandwidth reads it:

    heads                       v5e   v5p   v6e
    32 on 8 of 128              24%   34%   40%
    64 on 64 of 128             38%   56%   57%
    16 on latents, 512 + 64     39%   56%   46%
    128 on latents, 512 + 64    98%  142%   97%   (nearly all of it is the products)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# exp(_MASKED - _LEAST) is 0, so a row that has seen nothing yet sums to 0.
_MASKED, _LEAST = -2e38, -1e30
_BLOCK_BYTES, _VMEM_BYTES = 2**20, 48 * 2**20
_LANES = 128


class Scalars(NamedTuple):
    """What a kernel needs before its blocks are fetched.

    Attributes:
      first, end: int32 [B], a row sees slots first <= j < end only; blocks outside are neither fetched nor computed.
      query_slot: int32 [B].
      layer: int32 [1], of stacked caches.
      scale: float32 [B], times the scores.
    """

    first: jax.Array
    end: jax.Array
    query_slot: jax.Array
    layer: jax.Array
    scale: jax.Array


class Operands(NamedTuple):
    """The arrays, and later their blocks in the kernel; what is absent is None.

    Attributes:
      q: [B, N, H]. q_rope: [B, N, R].
      k: [L, B, S * K, H]. v: [L, B, S * K, Hv]; None: the keys. k_rope: [L, B, S * K, R].
      visible: int32 [B, 1, S * K], 0 = not to be seen.
      slopes: float32 [N, 1].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array | None
    q_rope: jax.Array | None
    k_rope: jax.Array | None
    visible: jax.Array | None
    slopes: jax.Array | None


def decode(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array | None,
    scalars: Scalars,
    *,
    visible: jax.Array | None,
    alibi_slopes: jax.Array | None,
    query_rope: jax.Array | None,
    key_rope: jax.Array | None,
    soft_cap: float | None,
    block_size: int | None,
    interpret: bool,
) -> jax.Array:
    """Return softmax(scores) v, [B, N, Hv] in q's dtype.

    Args:
      q: [B, N, H]. k_cache, v_cache: [L, B, S, K, H]; v_cache None: the keys.
      visible: bool [B, S], slots not to see besides `scalars`. alibi_slopes: float32 [N].
      query_rope: [B, N, R], key_rope: [L, B, S, K, R]: a second product that is added to the scores.
      block_size: slots per step; None: `default_block_size`.
    """
    batch, num_heads, _ = q.shape
    slots, kv_heads = k_cache.shape[2:4]
    width = (k_cache if v_cache is None else v_cache).shape[-1]
    block = min(block_size or default_block_size(q, k_cache), slots)
    operands = Operands(
        q=q,
        k=_flat(k_cache),
        v=_flat(v_cache),
        q_rope=query_rope,
        k_rope=_flat(key_rope),
        visible=None if visible is None else _spread(visible, kv_heads),
        slopes=None if alibi_slopes is None else alibi_slopes.astype(jnp.float32)[:, None],
    )
    live = jnp.maximum(scalars.end - 1, 0) // block - scalars.first // block + 1
    body = functools.partial(
        _body,
        present=[array is not None for array in operands],
        block=block,
        slots=slots,
        kv_heads=kv_heads,
        group=num_heads // kv_heads,
        soft_cap=soft_cap,
    )
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            # As many steps as the row with most blocks to read has.
            grid=(batch, jnp.maximum(jnp.max(live), 1)),
            in_specs=_block_specs(operands, block, kv_heads),
            out_specs=pl.BlockSpec((None, num_heads, width), lambda row, step, *scalars: (row, 0, 0)),
            scratch_shapes=[pltpu.VMEM((num_heads, size), jnp.float32) for size in (width, 1, 1)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, width), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(operands, width),
        name="jaxllm_decode",
        interpret=interpret,
    )
    return call(*scalars, *(array for array in operands if array is not None))


def default_block_size(q: jax.Array, k_cache: jax.Array) -> int:
    """Return the slots per step: about a mebibyte of keys, scores of no more, and whole lanes of keys."""
    kv_heads, head_dim = k_cache.shape[3:]
    keys = kv_heads * max(head_dim, _LANES) * k_cache.dtype.itemsize
    scores = q.shape[1] * kv_heads * 4
    whole = _slots_of_whole_lanes(kv_heads)
    return max(_BLOCK_BYTES // max(keys, scores) // whole, 1) * whole


def _slots_of_whole_lanes(kv_heads: int) -> int:
    return _LANES // math.gcd(kv_heads, _LANES)


def _flat(cache: jax.Array | None) -> jax.Array | None:
    # Nothing moves where H fills whole lanes; elsewhere the compiler lays the cache out for it before a loop of tokens.
    return None if cache is None else cache.reshape(*cache.shape[:2], -1, cache.shape[-1])


def _spread(visible: jax.Array, kv_heads: int) -> jax.Array:
    """Repeat each slot's flag for its keys: int32 [B, 1, S * K].

    As a product, for a repetition would pass through [B, S, K], of which every K take 128 lanes.
    """
    batch, slots = visible.shape
    whole = _slots_of_whole_lanes(kv_heads)
    flags = jnp.pad(visible.astype(jnp.bfloat16), ((0, 0), (0, -slots % whole))).reshape(batch, -1, whole)
    repeated = flags @ jnp.repeat(jnp.eye(whole, dtype=flags.dtype), kv_heads, axis=1)[None]
    return repeated.reshape(batch, 1, -1)[:, :, : slots * kv_heads].astype(jnp.int32)


def _block_specs(operands: Operands, block: int, kv_heads: int) -> list[pl.BlockSpec]:
    """Return how to cut the operands that are there."""

    def block_of(row, step, scalars):
        """Steps beyond a row's last block stay there, which fetches nothing."""
        return jnp.minimum(scalars.first[row] // block + step, jnp.maximum(scalars.end[row] - 1, 0) // block)

    def of_row(array):
        return pl.BlockSpec((None, *array.shape[1:]), lambda row, step, *scalars: (row, 0, 0))

    def of_cache(array):
        def index(row, step, *scalars):
            scalars = Scalars(*scalars)
            return scalars.layer[0], row, block_of(row, step, scalars), 0

        return pl.BlockSpec((None, None, block * kv_heads, array.shape[-1]), index)

    def of_slots(array):
        return pl.BlockSpec(
            (None, 1, block * kv_heads), lambda row, step, *scalars: (row, 0, block_of(row, step, Scalars(*scalars)))
        )

    def whole(array):
        return pl.BlockSpec(array.shape, lambda row, step, *scalars: (0, 0))

    cuts = Operands(q=of_row, k=of_cache, v=of_cache, q_rope=of_row, k_rope=of_cache, visible=of_slots, slopes=whole)
    return [cut(array) for cut, array in zip(cuts, operands, strict=True) if array is not None]


def _body(*refs, present, block, slots, kv_heads, group, soft_cap):
    """Add one block of slots to a row's running softmax (arXiv:1805.02867) and values."""
    scalars, refs = Scalars(*refs[: len(Scalars._fields)]), iter(refs[len(Scalars._fields) :])
    operands = Operands(*(next(refs) if there else None for there in present))
    out, total, largest, weight = refs
    row, step = pl.program_id(0), pl.program_id(1)
    first, end = scalars.first[row], scalars.end[row]
    start = (first // block + step) * block

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        largest[...] = jnp.full_like(largest, _LEAST)
        weight[...] = jnp.zeros_like(weight)

    @pl.when(start < end)
    def _():
        column = jax.lax.broadcasted_iota(jnp.int32, (1, block * kv_heads), 1)
        slot = start + column // kv_heads
        seen = (slot >= first) & (slot < end)
        if operands.visible is not None:
            seen &= operands.visible[...] != 0
        head_seen = jnp.where(seen, column % kv_heads, -1)
        head = jax.lax.broadcasted_iota(jnp.int32, (total.shape[0], 1), 0) // group

        k = operands.k[...]
        scores = _product(operands.q[...], k, transposed=True)
        if operands.q_rope is not None:
            scores += _product(operands.q_rope[...], operands.k_rope[...], transposed=True)
        scores *= scalars.scale[row]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if operands.slopes is not None:
            scores -= operands.slopes[...] * jnp.abs(scalars.query_slot[row] - slot).astype(jnp.float32)
        scores = jnp.where(head == head_seen, scores, _MASKED)

        before = largest[...]
        largest[...] = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp(scores - largest[...])
        fade = jnp.exp(before - largest[...])
        weight[...] = fade * weight[...] + jnp.sum(p, axis=1, keepdims=True)
        v = k if operands.v is None else operands.v[...]
        if slots % block:
            # What is read past the end of the cache may be NaN, and NaN times a weight of 0 would be NaN.
            slot = start + jax.lax.broadcasted_iota(jnp.int32, (v.shape[0], 1), 0) // kv_heads
            v = jnp.where(slot < slots, v, 0)
        total[...] = fade * total[...] + _product(p.astype(v.dtype), v)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[...] = (total[...] / jnp.where(weight[...] == 0, 1, weight[...])).astype(out.dtype)


def _product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """Return a b, or a b^T, in float32; float32 inputs are not rounded to bfloat16."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _cost(operands: Operands, width: int) -> pl.CostEstimate:
    q, k = operands.q, operands.k
    batch, num_heads, head_dim = q.shape
    scores = batch * num_heads * k.shape[2]
    inner = head_dim if operands.q_rope is None else head_dim + operands.q_rope.shape[-1]
    caches = [cache for cache in (k, operands.v, operands.k_rope) if cache is not None]
    return pl.CostEstimate(
        flops=2 * scores * (inner + width),
        transcendentals=scores,
        bytes_accessed=sum(cache.size // cache.shape[0] * cache.dtype.itemsize for cache in caches),
    )
