"""What the TPU flash kernels compute in a tile: when, in which order, and its scores."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tiles
from kernels_pallas.flash_tpu_tiles import Info, Scalars, Tile
from kernels_pallas.options import LOG2_E
from kernels_pallas.visible import visible

MASKED, LEAST = -2e38, -1e30
"""A masked score, and what a row's maximum starts from: exp2(MASKED - LEAST) is 0, so a row without keys sums to 0."""

_ROWS = 256


def row_groups(block: int) -> list[slice]:
    """Cut a tile's rows into equal groups, an even number, of at most 256 rows."""
    number = next(number for number in range(2, block + 1, 2) if block % number == 0 and block // number <= _ROWS)
    return [slice(start, start + block // number) for start in range(0, block, block // number)]


def pipeline(groups: list[slice], first: Callable, middle: Callable, last: Callable) -> None:
    """Run last(rows, middle(rows, first(rows))) for every group, written so that products and vector work overlap.

    The compiler schedules straight-line code in order: a group's vector work stands between the products of the
    groups after and before it.
    """
    ahead, behind = first(groups[0]), None
    for number, rows in enumerate(groups):
        here = ahead
        if number + 1 < len(groups):
            ahead = first(groups[number + 1])
        if number > 0:
            last(groups[number - 1], behind)
        behind = middle(rows, here)
    last(groups[-1], behind)


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the product over axis contract[0] of x and contract[1] of y, in float32 throughout."""
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def widen(column: jax.Array, width: int) -> jax.Array:
    """Repeat a column that already fills the lanes, [rows, lanes], to [rows, width]."""
    return jnp.tile(column, (1, -(-width // column.shape[1])))[:, :width]


def as_column(row: jax.Array, lanes: int) -> jax.Array:
    """Turn [1, rows] into [rows, lanes], repeated along the lanes."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


Reach = Callable[[slice], slice]
"""From a group of a tile's rows to the columns that it is computed for."""


def live(
    tile: Tile, scalars: Scalars, step: jax.Array, query_axis: int, compute: Callable[[bool, Reach], None]
) -> None:
    """Run compute(masked, reach) for a tile, with the mask where it needs one, without a corner that nobody sees.

    Args:
      query_axis: the axis of the scores that counts queries.
    """
    rows, width = (tile.queries, tile.keys) if query_axis == 0 else (tile.keys, tile.queries)
    first, second, both = slice(0, width // 2), slice(width // 2, width), slice(0, width)

    def run(masked: bool, early: slice, late: slice) -> Callable[[], None]:
        return lambda: compute(masked, lambda group: early if group.start < rows // 2 else late)

    masked, cut_late, cut_early = (
        scalars.flagged(step, flag) for flag in (tiles.MASKED, tiles.CUT_LATE, tiles.CUT_EARLY)
    )
    pl.when(scalars.flagged(step, tiles.LIVE) & ~masked)(run(False, both, both))
    pl.when(masked & ~cut_late & ~cut_early)(run(True, both, both))
    # Of early queries and late keys; where rows are keys, those are late rows and early columns.
    if tile.has_late_corners:
        pl.when(cut_late)(run(True, first, both) if query_axis == 0 else run(True, both, second))
    if tile.has_early_corners:
        pl.when(cut_early)(run(True, both, second) if query_axis == 0 else run(True, first, both))


def distances(
    tile: Tile, scalars: Scalars, query_tile: jax.Array, key_tile: jax.Array, part: tuple[slice, slice], query_axis: int
) -> jax.Array:
    """Return the queries' slots less the keys', int32, of a part of a tile; its axis `query_axis` counts queries."""
    shape = tuple(piece.stop - piece.start for piece in part)
    start = scalars.places[0] + query_tile * tile.queries - key_tile * tile.keys
    start += part[query_axis].start - part[1 - query_axis].start
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (query_axis, 1 - query_axis))
    return query - key + start


def exponents(
    raw: jax.Array, tile: Tile, scalars: Scalars, head: jax.Array, distance: jax.Array, masked: bool, info: Info
) -> jax.Array:
    """Return the exponents of 2 of the raw scores, MASKED where not visible.

    Args:
      raw: products of queries and keys, times options.factor and query_scale.
      info: the integers of the tile's queries and keys, broadcasting against raw.
    """
    soft_cap = tile.options.soft_cap
    scores = raw if soft_cap is None else soft_cap * LOG2_E * jnp.tanh(raw)
    if tile.alibi:
        scores -= scalars.slopes[head] * jnp.abs(distance).astype(jnp.float32)
    if not masked:
        return scores
    window = scalars.places[1] if tile.window else None
    sees = visible(distance, tile.options.causal, window, *info)
    return scores if sees is None else jnp.where(sees, scores, MASKED)


def raw_gradient(ds: jax.Array, raw: jax.Array, tile: Tile) -> jax.Array:
    """Return the gradient of the raw scores, but for their factors, from that of the scores in base e."""
    return ds if tile.options.soft_cap is None else ds * (1 - jnp.square(jnp.tanh(raw)))
