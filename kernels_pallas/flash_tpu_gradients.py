"""Flash attention for TPU: the backward kernel (arXiv:2307.08691), block-sparse by tables of tiles.

One kernel computes all gradients, with five products a tile, from probabilities computed again from the scores and the
log-sum-exp; a kernel for dq and one for dk and dv would need seven. It goes query tile by query tile with dq in
scratch, and keeps dk and dv of all keys, summed over the heads of a group, in vector memory until the row is done.
Scores are transposed, their rows are keys: the log-sum-exp and delta of the queries are then rows, which registers
repeat for nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tiles
from kernels_pallas.cost import attention_cost, visible_pairs
from kernels_pallas.flash_tpu_bodies import (
    Reach,
    as_column,
    distances,
    dot,
    exponents,
    live,
    pipeline,
    raw_gradient,
    row_groups,
    widen,
)
from kernels_pallas.flash_tpu_tiles import (
    Info,
    Scalars,
    Tile,
    as_row,
    columns,
    heads_first,
    heads_last,
    info_rows,
    row_of_all_heads,
    vmem_limit,
    walk,
)
from kernels_pallas.options import Options
from kernels_pallas.visible import Masks


class Queries(NamedTuple):
    """What belongs to the queries: q, do [B, T, N, H or Hv]; lse (of base 2), delta float32 [B, N, T]; their scale."""

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array
    scale: jax.Array | None


class Inputs(NamedTuple):
    """The arrays the kernel reads, or their blocks.

    Attributes:
      q, do: [B, N, T, H or Hv]. lse, delta: float32 [B, N, 1, T]. scale: float32 [B, 1, T] or None, query_scale.
      k, v: [B, K, S, H or Hv]. info: see Info.
    """

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array
    scale: jax.Array | None
    k: jax.Array
    v: jax.Array
    info: Info


def compute_gradients(
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    masks: Masks,
    options: Options,
    blocks: tuple[int, int],
    dq_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (dq, in dq_dtype and not yet times queries.scale, dk, dv); k, v: keys that fit into vector memory."""
    (batch, length, num_heads, head_dim), (slots, num_kv_heads, value_dim) = (
        queries.q.shape,
        (*k.shape[1:3], v.shape[3]),
    )
    tile, count, scalars, info = walk(masks, slopes, options, blocks, queries.q, k)
    group = num_heads // num_kv_heads
    inputs = Inputs(
        *(heads_first(x, tile.queries) for x in (queries.q, queries.do)),
        *(as_row(x, tile.queries) for x in (queries.lse, queries.delta, queries.scale)),
        *(heads_first(x, tile.keys) for x in (k, v)),
        info,
    )

    num_tiles = inputs.k.shape[2] // tile.keys
    in_specs, out_specs = _block_specs(tile, group, num_tiles, inputs)
    out_shape = (
        jax.ShapeDtypeStruct(inputs.q.shape, dq_dtype),
        *(jax.ShapeDtypeStruct((batch, num_kv_heads, num_tiles, tile.keys, x.shape[-1]), x.dtype) for x in (k, v)),
    )
    pairs = batch * num_heads * visible_pairs(length, slots, options)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, tile, group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_kv_heads, count, group),
            in_specs=[in_specs],
            out_specs=out_specs,
            scratch_shapes=[_scratch(tile, group, num_tiles, head_dim, value_dim, info)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit(options)
        ),
        cost_estimate=attention_cost(pairs, 3 * head_dim + 2 * value_dim, (inputs, out_shape)),
        interpret=options.interpret,
        name="jaxllm_flash_backward",
    )(scalars, inputs)
    dk, dv = (heads_last(x.reshape(batch, num_kv_heads, -1, x.shape[-1]), slots) for x in (dk, dv))
    return heads_last(dq, length), dk, dv


def _block_specs(tile: Tile, group: int, num_tiles: int, inputs: Inputs) -> tuple[Inputs, tuple[pl.BlockSpec, ...]]:
    """Return what a step sees of its inputs, and of dq (a query tile of a group's heads), dk and dv (all keys)."""
    head_dim, value_dim = inputs.k.shape[-1], inputs.v.shape[-1]

    def query_at(head: jax.Array, step: jax.Array, member: jax.Array, at: Scalars) -> tuple[jax.Array, ...]:
        return at.row(step), head, at.outer_tile(step)

    def key_at(head: jax.Array, step: jax.Array, member: jax.Array, at: Scalars) -> tuple[jax.Array, ...]:
        return at.row(step), head, at.inner_tile(step)

    def of_group(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, group, tile.queries, width), lambda *step: (*query_at(*step), 0))

    def row_of_group(*step: jax.Array) -> tuple[jax.Array, ...]:
        row, head, tile = query_at(*step)
        return row, head, 0, tile

    def all_keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, num_tiles, tile.keys, width), lambda head, step, member, at: (at.row(step), head, 0, 0, 0)
        )

    group_row = pl.BlockSpec((None, group, 1, tile.queries), row_of_group)
    in_specs = Inputs(
        of_group(head_dim),
        of_group(value_dim),
        group_row,
        group_row,
        row_of_all_heads(inputs.scale, tile.queries, query_at),
        columns(tile.keys, head_dim, key_at),
        columns(tile.keys, value_dim, key_at),
        info_rows(inputs.info, tile, query_at, key_at),
    )
    return in_specs, (of_group(head_dim), all_keys(head_dim), all_keys(value_dim))


class _Scratch(NamedTuple):
    """Sums so far, and a key tile's integers as columns.

    Attributes:
      dq: float32 [group, queries, H]. dk, dv: float32 [key tiles, keys, H or Hv].
      segments, prefix: int32 [keys, lanes], the same in all lanes; None: the mask has no such part.
    """

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    segments: jax.Array | None
    prefix: jax.Array | None


def _scratch(tile: Tile, group: int, num_tiles: int, head_dim: int, value_dim: int, info: Info) -> _Scratch:
    column = pltpu.VMEM((tile.keys, tile.lanes), jnp.int32)
    return _Scratch(
        pltpu.VMEM((group, tile.queries, head_dim), jnp.float32),
        pltpu.VMEM((num_tiles, tile.keys, head_dim), jnp.float32),
        pltpu.VMEM((num_tiles, tile.keys, value_dim), jnp.float32),
        None if info.key_segments is None else column,
        None if info.prefix is None else column,
    )


def _kernel(tile: Tile, group: int, scalars: Scalars, refs: Inputs, dq_ref, dk_ref, dv_ref, scratch: _Scratch) -> None:
    step, member = pl.program_id(1), pl.program_id(2)
    head = pl.program_id(0) * group + member
    query_tile, key_tile = scalars.outer_tile(step), scalars.inner_tile(step)
    _begin(tile, scalars, step, member, refs.info, scratch)

    def compute(masked: bool, reach: Reach) -> None:
        def products(rows: slice) -> tuple[jax.Array, jax.Array]:
            queries = reach(rows)
            return (
                dot(refs.k[rows], refs.q[member, queries], (1, 1)),
                dot(refs.v[rows], refs.do[member, queries], (1, 1)),
            )

        def gradients(rows: slice, raw_dp: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            raw, dp = raw_dp
            part = (rows, reach(rows))
            scale = None if refs.scale is None else refs.scale[:, part[1]]
            raw *= tile.options.factor if scale is None else scale * tile.options.factor
            distance = distances(tile, scalars, query_tile, key_tile, part, 1)
            info = _info_of(part, refs.info, scratch) if masked else refs.info
            p = jnp.exp2(exponents(raw, tile, scalars, head, distance, masked, info) - refs.lse[member, :, part[1]])
            ds = raw_gradient(p * (dp - refs.delta[member, :, part[1]]), raw, tile)
            return p, ds, ds if scale is None else ds * scale

        def accumulate(rows: slice, factors: tuple[jax.Array, jax.Array, jax.Array]) -> None:
            p, ds, scaled_ds = (x.astype(refs.q.dtype) for x in factors)
            queries = reach(rows)
            scratch.dv[key_tile, rows] += dot(p, refs.do[member, queries], (1, 0))
            scratch.dk[key_tile, rows] += dot(scaled_ds, refs.q[member, queries], (1, 0))
            scratch.dq[member, queries] += dot(ds, refs.k[rows], (0, 0))

        pipeline(row_groups(tile.keys), products, gradients, accumulate)

    live(tile, scalars, step, 1, compute)

    @pl.when(scalars.flagged(step, tiles.LAST))
    def _():
        dq_ref[member] = (scratch.dq[member] * tile.options.scale).astype(dq_ref.dtype)

    @pl.when(scalars.flagged(step, tiles.ROW_LAST) & (member == group - 1))
    def _():
        @pl.loop(0, scratch.dk.shape[0])
        def _(number):
            dk_ref[number] = (scratch.dk[number] * tile.options.scale).astype(dk_ref.dtype)
            dv_ref[number] = scratch.dv[number].astype(dv_ref.dtype)


def _begin(tile: Tile, scalars: Scalars, step: jax.Array, member: jax.Array, info: Info, scratch: _Scratch) -> None:
    """Clear the sums of a new row or query tile, and lay a masked key tile's integers out as columns."""

    @pl.when(scalars.flagged(step, tiles.ROW_FIRST) & (member == 0))
    def _():
        @pl.loop(0, scratch.dk.shape[0])
        def _(number):
            scratch.dk[number] = jnp.zeros(scratch.dk.shape[1:], jnp.float32)
            scratch.dv[number] = jnp.zeros(scratch.dv.shape[1:], jnp.float32)

    @pl.when(scalars.flagged(step, tiles.FIRST))
    def _():
        scratch.dq[member] = jnp.zeros(scratch.dq.shape[1:], jnp.float32)

    @pl.when(scalars.flagged(step, tiles.MASKED) & (member == 0))
    def _():
        if scratch.segments is not None:
            scratch.segments[...] = as_column(info.key_segments[...], tile.lanes)
        if scratch.prefix is not None:
            scratch.prefix[...] = as_column(info.prefix[...], tile.lanes)


def _info_of(part: tuple[slice, slice], info: Info, columns: _Scratch) -> Info:
    """Return what masks a part of a tile, [keys or 1, queries]."""
    rows, queries = part
    width = queries.stop - queries.start
    return Info(
        None if columns.segments is None else info.query_segments[:, queries],
        None if columns.segments is None else widen(columns.segments[rows], width),
        None if columns.prefix is None else widen(columns.prefix[rows], width),
    )
