"""Flash attention for TPU: the forward kernel (arXiv:2307.08691), block-sparse by tables of tiles.

One step of the grid is one tile that some query sees, of one head; the steps of a query tile follow each other, with
the maximum, the sum and the output of its rows in scratch. The schedule of a tile is written out by hand, see
flash_tpu_bodies.pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tiles
from kernels_pallas.cost import attention_cost, visible_pairs
from kernels_pallas.flash_tpu_backward import backward
from kernels_pallas.flash_tpu_bodies import (
    LEAST,
    Reach,
    as_column,
    distances,
    dot,
    exponents,
    live,
    pipeline,
    row_groups,
    widen,
)
from kernels_pallas.flash_tpu_tiles import (
    Info,
    Scalars,
    Tile,
    as_row,
    columns,
    default_block_sizes,
    heads_first,
    heads_last,
    info_rows,
    row,
    row_of_all_heads,
    vmem_limit,
    walk,
)
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
    (batch, length, num_heads, head_dim), (slots, num_kv_heads, value_dim) = q.shape, (*k.shape[1:3], v.shape[3])
    blocks = (options.block_sizes or default_block_sizes(head_dim, masks)).forward
    tile, count, scalars, info = walk(masks, slopes, options, blocks, q, k)
    group = num_heads // num_kv_heads

    def query_at(head: jax.Array, step: jax.Array, at: Scalars) -> tuple[jax.Array, ...]:
        return at.row(step), head, at.outer_tile(step)

    def key_at(head: jax.Array, step: jax.Array, at: Scalars) -> tuple[jax.Array, ...]:
        return at.row(step), head // group, at.inner_tile(step)

    query_scale = as_row(query_scale, tile.queries)
    q, k, v = heads_first(q, tile.queries), heads_first(k, tile.keys), heads_first(v, tile.keys)
    out_shape = (
        jax.ShapeDtypeStruct((*q.shape[:3], value_dim), q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, 1, q.shape[2]), jnp.float32),
    )
    pairs = batch * num_heads * visible_pairs(length, slots, options)
    o, lse = pl.pallas_call(
        functools.partial(_kernel, tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_heads, count),
            in_specs=[
                columns(tile.queries, head_dim, query_at),
                row_of_all_heads(query_scale, tile.queries, query_at),
                columns(tile.keys, head_dim, key_at),
                columns(tile.keys, value_dim, key_at),
                info_rows(info, tile, query_at, key_at),
            ],
            out_specs=(columns(tile.queries, value_dim, query_at), row(tile.queries, query_at)),
            scratch_shapes=[_scratch(tile, value_dim, query_scale, info)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit(options)
        ),
        cost_estimate=attention_cost(pairs, head_dim + value_dim, (q, k, v, out_shape)),
        interpret=options.interpret,
        name="jaxllm_flash_forward",
    )(scalars, q, query_scale, k, v, info)
    return heads_last(o, length), lse[:, :, 0, :length]


class _Scratch(NamedTuple):
    """The state of a query tile's rows.

    Attributes:
      peak: float32 [queries, lanes], the running maximum, the same in all lanes.
      total: float32 [queries, lanes], the running sum, of every lane's own columns.
      sum: float32 [queries, Hv], of exponentials times values.
      factor: float32 [queries, lanes], of the scores, the same in all lanes; None: the same for all queries.
      segments: int32 [queries, lanes], the same in all lanes; None: no segments.
    """

    peak: jax.Array
    total: jax.Array
    sum: jax.Array
    factor: jax.Array | None
    segments: jax.Array | None


def _scratch(tile: Tile, value_dim: int, query_scale: jax.Array | None, info: Info) -> _Scratch:
    column = (tile.queries, tile.lanes)
    return _Scratch(
        pltpu.VMEM(column, jnp.float32),
        pltpu.VMEM(column, jnp.float32),
        pltpu.VMEM((tile.queries, value_dim), jnp.float32),
        None if query_scale is None else pltpu.VMEM(column, jnp.float32),
        None if info.query_segments is None else pltpu.VMEM(column, jnp.int32),
    )


def _kernel(
    tile: Tile, scalars: Scalars, q_ref, scale_ref, k_ref, v_ref, info: Info, o_ref, lse_ref, scratch: _Scratch
) -> None:
    head, step = pl.program_id(0), pl.program_id(1)

    @pl.when(scalars.flagged(step, tiles.FIRST))
    def _():
        scratch.peak[...] = jnp.full_like(scratch.peak, LEAST)
        scratch.total[...] = jnp.zeros_like(scratch.total)
        scratch.sum[...] = jnp.zeros_like(scratch.sum)
        if scratch.factor is not None:
            scratch.factor[...] = as_column(scale_ref[...], tile.lanes) * tile.options.factor
        if scratch.segments is not None:
            scratch.segments[...] = as_column(info.query_segments[...], tile.lanes)

    def compute(masked: bool, reach: Reach) -> None:
        def scores(rows: slice) -> jax.Array:
            return dot(q_ref[rows], k_ref[reach(rows)], (1, 1))

        def soften(rows: slice, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
            shared = scratch.factor is None
            raw *= tile.options.factor if shared else widen(scratch.factor[rows], raw.shape[1])
            part = (rows, reach(rows))
            distance = distances(tile, scalars, scalars.outer_tile(step), scalars.inner_tile(step), part, 0)
            here = _info_of(part, info, scratch.segments) if masked else info
            s = exponents(raw, tile, scalars, head, distance, masked, here)
            peak = jnp.maximum(scratch.peak[rows], jnp.max(_over_lanes(jnp.maximum, s, tile), axis=1, keepdims=True))
            shrink = jnp.exp2(scratch.peak[rows] - peak)
            p = jnp.exp2(s - widen(peak, s.shape[1]))
            # The lanes are summed once, when the row of tiles is done.
            scratch.total[rows] = scratch.total[rows] * shrink + _over_lanes(jnp.add, p, tile)
            scratch.peak[rows] = peak
            return shrink, p

        def accumulate(rows: slice, softened: tuple[jax.Array, jax.Array]) -> None:
            shrink, p = softened
            product = dot(p.astype(v_ref.dtype), v_ref[reach(rows)], (1, 0))
            scratch.sum[rows] = scratch.sum[rows] * widen(shrink, v_ref.shape[1]) + product

        pipeline(row_groups(tile.queries), scores, soften, accumulate)

    live(tile, scalars, step, 0, compute)

    @pl.when(scalars.flagged(step, tiles.LAST))
    def _():
        total = jnp.sum(scratch.total[...], axis=1, keepdims=True)
        seen = total > 0
        total = jnp.where(seen, total, 1)
        o_ref[...] = (scratch.sum[...] / total).astype(o_ref.dtype)
        lse = jnp.where(seen, scratch.peak[...] / LOG2_E + jnp.log(total), NOTHING_SEEN)
        lse_ref[...] = lse.T[:1]


def _info_of(part: tuple[slice, slice], info: Info, segments: jax.Array | None) -> Info:
    """Return what masks a part of a tile, [queries or 1, keys]; segments: the queries' column."""
    rows, keys = part
    return Info(
        None if segments is None else widen(segments[rows], keys.stop - keys.start),
        None if segments is None else info.key_segments[:, keys],
        None if info.prefix is None else info.prefix[:, keys],
    )


def _over_lanes(combine: Callable, x: jax.Array, tile: Tile) -> jax.Array:
    """Combine the columns of x, register by register, down to one register's lanes: [rows, lanes]."""
    return functools.reduce(combine, (x[:, start : start + tile.lanes] for start in range(0, x.shape[1], tile.lanes)))
