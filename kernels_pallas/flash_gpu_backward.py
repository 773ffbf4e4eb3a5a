"""Flash attention for GPU: the backward pass, a kernel that sums dq over the keys, and one for dk and dv.

The second has a program for each tile of keys of each key head, and sums over the queries of all its group's heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import gpu_tiles
from kernels_pallas.cost import attention_cost, visible_pairs
from kernels_pallas.gpu_launch import LEAST, Launch, choose_launch
from kernels_pallas.gpu_tiles import Tables, Tile, load, pad, store
from kernels_pallas.options import LOG2_E, Options
from kernels_pallas.visible import Masks


class Operands(NamedTuple):
    """What both kernels read."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array
    query_scale: jax.Array | None
    slopes: jax.Array | None


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
    operands = Operands(q, k, v, do, lse, delta, query_scale, slopes)
    head_dim, value_dim = q.shape[3], v.shape[3]
    launch, widths = choose_launch("dq", q, v, options), 2 * head_dim + value_dim
    (dq,) = _call(_dq_kernel, "jaxllm_flash_dq", operands, ("q",), widths, masks, launch, options)
    launch, widths = choose_launch("dkv", q, v, options), 2 * head_dim + 2 * value_dim
    dk, dv = _call(_dkv_kernel, "jaxllm_flash_dkv", operands, ("k", "v"), widths, masks, launch, options)
    return dq, dk, dv


def _call(
    kernel: Callable,
    name: str,
    operands: Operands,
    of: Sequence[str],
    widths: int,
    masks: Masks,
    launch: Launch,
    options: Options,
) -> list[jax.Array]:
    """Run a kernel that gives the gradients `of` some operands, a program for each outer tile of their heads.

    Args:
      widths: head dims of its products, summed.
    """
    tile = Tile(launch.blocks, operands.k.shape[1], options, by_keys="k" in of)
    tables = gpu_tiles.tables(masks, operands.q.shape[1], tile)
    by_query, by_key = ({1: block, 3: LEAST} for block in tile.blocks)
    padded = Operands(
        q=pad(operands.q, by_query),
        k=pad(operands.k, by_key),
        v=pad(operands.v, by_key),
        do=pad(operands.do, by_query),
        lse=pad(operands.lse, {2: tile.blocks[0]}),
        delta=pad(operands.delta, {2: tile.blocks[0]}),
        query_scale=None if operands.query_scale is None else pad(operands.query_scale, by_query),
        slopes=operands.slopes,
    )
    wanted = [(getattr(operands, x), getattr(padded, x)) for x in of]
    dtype = operands.q.dtype if tile.by_keys or operands.query_scale is None else jnp.float32
    out_shape = [jax.ShapeDtypeStruct(x.shape, dtype) for _, x in wanted]
    batch, length, num_heads, _ = operands.q.shape
    pairs = batch * num_heads * visible_pairs(length, operands.k.shape[1], options)
    gradients = pl.pallas_call(
        functools.partial(kernel, tile),
        grid=(tables.full.shape[1], wanted[0][0].shape[2], operands.q.shape[0]),
        out_shape=out_shape,
        compiler_params=launch.compiler_params(),
        cost_estimate=attention_cost(pairs, widths, (padded, out_shape)),
        interpret=options.interpret,
        name=name,
    )(padded, gpu_tiles.mask_arrays(masks, tile), tables)
    return [dx[:, : x.shape[1], :, : x.shape[3]] for dx, (x, _) in zip(gradients, wanted, strict=True)]


def _dq_kernel(tile: Tile, refs: Operands, masks: Masks, tables: Tables, dq_ref: jax.Ref) -> None:
    # The longest programs first, as in the forward pass.
    outer = pl.num_programs(0) - 1 - pl.program_id(0)
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = jax.lax.div(head, jnp.int32(refs.q.shape[2] // refs.k.shape[2]))
    queries = tile.queries(outer)
    masks = gpu_tiles.read_numbers(masks)
    slope = None if refs.slopes is None else refs.slopes[head]
    q, do = load(refs.q, row, queries, head), load(refs.do, row, queries, head)
    lse = tile.along_queries(refs.lse[row, head, queries] * LOG2_E)
    delta = tile.along_queries(refs.delta[row, head, queries])
    query_scale = None if refs.query_scale is None else refs.query_scale[row, queries]

    def body(inner, _, masked, sums):
        keys = tile.keys(inner)
        k, v = load(refs.k, row, keys, kv_head), load(refs.v, row, keys, kv_head)
        scores, cap_slope = tile.scores(tile.inner(q, k), query_scale, masks, slope, row, (outer, inner), masked)
        gradient = _score_gradient(tile.exp2(scores - lse), tile.inner(do, v) - delta, cap_slope)
        return tile.add_product(sums, gradient, k)

    sums = gpu_tiles.over_tiles(tables, row, outer, body, gpu_tiles.zeros(queries.size, refs.q.shape[-1]))
    store(dq_ref, row, queries, head, [x * tile.options.scale for x in sums])


def _dkv_kernel(tile: Tile, refs: Operands, masks: Masks, tables: Tables, dk_ref: jax.Ref, dv_ref: jax.Ref) -> None:
    outer, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    masks = gpu_tiles.read_numbers(masks)
    group = refs.q.shape[2] // refs.k.shape[2]
    keys = tile.keys(outer)
    k, v = load(refs.k, row, keys, kv_head), load(refs.v, row, keys, kv_head)

    def body(inner, member, masked, sums):
        dk, dv = sums
        queries, head = tile.queries(inner), kv_head * group + member
        slope = None if refs.slopes is None else refs.slopes[head]
        q, do = load(refs.q, row, queries, head), load(refs.do, row, queries, head)
        lse = tile.along_queries(refs.lse[row, head, queries] * LOG2_E)
        delta = tile.along_queries(refs.delta[row, head, queries])
        query_scale = None if refs.query_scale is None else refs.query_scale[row, queries]
        scores, cap_slope = tile.scores(tile.inner(k, q), query_scale, masks, slope, row, (inner, outer), masked)
        weights = tile.exp2(scores - lse)
        dv = tile.add_product(dv, weights, do)
        gradient = _score_gradient(weights, tile.inner(v, do) - delta, cap_slope)
        if query_scale is not None:
            gradient *= tile.along_queries(query_scale)
        return tile.add_product(dk, gradient, q), dv

    start = gpu_tiles.zeros(keys.size, dk_ref.shape[-1]), gpu_tiles.zeros(keys.size, dv_ref.shape[-1])
    dk, dv = gpu_tiles.over_tiles(tables, row, outer, body, start, repeats=group)
    store(dk_ref, row, keys, kv_head, [x * tile.options.scale for x in dk])
    store(dv_ref, row, keys, kv_head, dv)


def _score_gradient(weights: jax.Array, dweights: jax.Array, cap_slope: jax.Array | None) -> jax.Array:
    """Return the gradient of a tile's products of queries and keys, but for the factors of their scores."""
    gradient = weights * dweights
    return gradient if cap_slope is None else gradient * cap_slope
