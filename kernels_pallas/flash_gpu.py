"""Flash attention for GPU: the forward kernel (arXiv:2307.08691), block-sparse by tables of tiles.

One program for each tile of queries of each head walks along the tiles of keys that some query of it sees, those that
need no mask first. It is written for the Triton backend of Pallas.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import gpu_tiles
from kernels_pallas.cost import attention_cost, visible_pairs
from kernels_pallas.flash_gpu_backward import backward
from kernels_pallas.gpu_launch import LEAST, choose_launch
from kernels_pallas.gpu_tiles import Tables, Tile, load, pad, store
from kernels_pallas.options import LOG2_E, Options
from kernels_pallas.visible import NOTHING_SEEN, Masks

__all__ = ["backward", "forward"]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_scale: jax.Array | None,
    slopes: jax.Array | None,
    masks: Masks,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Return (o [B, T, N, Hv], lse float32 [B, N, T]); the arguments are described in flash_attention."""
    launch = choose_launch("forward", q, v, options)
    (batch, length, num_heads, head_dim), value_dim = q.shape, v.shape[3]
    tile = Tile(launch.blocks, k.shape[1], options)
    pairs = batch * num_heads * visible_pairs(length, k.shape[1], options)
    q = pad(q, {1: tile.blocks[0], 3: LEAST})
    k, v = (pad(x, {1: tile.blocks[1], 3: LEAST}) for x in (k, v))
    query_scale = None if query_scale is None else pad(query_scale, {1: tile.blocks[0]})
    out_shape = (
        jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, q.shape[1]), jnp.float32),
    )
    o, lse = pl.pallas_call(
        functools.partial(_kernel, tile),
        grid=(q.shape[1] // tile.blocks[0], num_heads, batch),
        out_shape=out_shape,
        compiler_params=launch.compiler_params(),
        cost_estimate=attention_cost(pairs, head_dim + value_dim, (q, k, v, out_shape)),
        interpret=options.interpret,
        name="jaxllm_flash_forward",
    )(q, k, v, query_scale, slopes, gpu_tiles.mask_arrays(masks, tile), gpu_tiles.tables(masks, length, tile))
    return o[:, :length, :, :value_dim], lse[:, :, :length]


def _kernel(
    tile: Tile,
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    query_scale_ref: jax.Ref | None,
    slopes_ref: jax.Ref | None,
    masks: Masks,
    tables: Tables,
    o_ref: jax.Ref,
    lse_ref: jax.Ref,
) -> None:
    # Under a causal mask the last queries see most keys: they start first, so that short programs fill up the end.
    outer = pl.num_programs(0) - 1 - pl.program_id(0)
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
    queries = tile.queries(outer)
    masks = gpu_tiles.read_numbers(masks)
    slope = None if slopes_ref is None else slopes_ref[head]
    q = load(q_ref, row, queries, head)
    query_scale = None if query_scale_ref is None else query_scale_ref[row, queries]

    def body(inner, _, masked, carry):
        peak, total, sums = carry
        keys = tile.keys(inner)
        product = tile.inner(q, load(k_ref, row, keys, kv_head))
        scores, _ = tile.scores(product, query_scale, masks, slope, row, (outer, inner), masked)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        shrink = tile.exp2(peak - higher)
        weights = tile.exp2(scores - higher[:, None])
        sums = [x * shrink[:, None] for x in sums]
        sums = tile.add_product(sums, weights, load(v_ref, row, keys, kv_head))
        return higher, total * shrink + jnp.sum(weights, axis=1), sums

    peak, total = jnp.full(queries.size, NOTHING_SEEN, jnp.float32), jnp.zeros(queries.size, jnp.float32)
    start = peak, total, gpu_tiles.zeros(queries.size, v_ref.shape[-1])
    peak, total, sums = gpu_tiles.over_tiles(tables, row, outer, body, start)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    store(o_ref, row, queries, head, [x / total[:, None] for x in sums])
    lse_ref[row, head, queries] = jnp.where(seen, peak / LOG2_E + jnp.log(total), NOTHING_SEEN)
