"""Which tiles of the scores a mask leaves to compute: tables that XLA builds from data, for kernels to walk along.

A tile is a block of queries times a block of keys. The tables are exact for a row's own segments in nondecreasing order
(packed documents, padding anywhere): a tile is visited only if a query of it sees a key of it. Ids in any other order
may cost visits, never results.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.visible import Masks

SKIP, FULL, PARTIAL, NONE_LATE, NONE_EARLY = 0, 1, 2, 3, 4
"""States of a tile: no pair is visible; every pair is; some are, so that the kernel must apply the mask; the same, and
the first half of the queries sees none of the second half of the keys; or the second half none of the first."""

FIRST, LAST, LIVE, MASKED, ROW_FIRST, ROW_LAST, CUT_LATE, CUT_EARLY = (1 << bit for bit in range(8))
"""Flags of a step: the first and last of its outer tile; a tile to compute; one that needs the mask; the first and last
of its row; one that is NONE_LATE, NONE_EARLY."""
NUM_FLAGS = 8

INT_MAX = jnp.iinfo(jnp.int32).max
INT_MIN = jnp.iinfo(jnp.int32).min


def tile_states(masks: Masks, lengths: tuple[int, int], blocks: tuple[int, int], *, causal: bool) -> jax.Array:
    """Return SKIP, FULL or PARTIAL for every tile: int32 [B or 1, query tiles, key tiles], 1 where masks are shared.

    Args:
      lengths: (T, S), queries and keys. blocks: (queries, keys) of a tile; the last tiles may be short.
    """
    query = _summary(masks.query_segments, lengths[0], blocks[0])
    key = _summary(masks.key_segments, lengths[1], blocks[1])
    query = _Summary(*(part[:, :, None] for part in query))
    # Slots of queries; a distance is a query's slot less a key's.
    first, last = masks.query_start + query.first, masks.query_start + query.last
    uniform = query.whole & key.whole[:, None] & (query.lowest == key.lowest[:, None])
    live, full = _overlap(query, key), uniform
    if causal or masks.window is not None:
        reach = INT_MAX if masks.window is None else masks.window - 1
        nearest, farthest = first - key.last[:, None], last - key.first[:, None]
        live &= jnp.maximum(nearest, 0) <= jnp.minimum(farthest, reach)
        bound = key
        if masks.prefix is not None:
            in_prefix = _summary(masks.key_segments, lengths[1], blocks[1], masks.prefix != 0)
            live |= _overlap(query, in_prefix)
            bound = _summary(masks.key_segments, lengths[1], blocks[1], masks.prefix == 0)
        within = (first >= bound.last[:, None]) & (last - reach <= bound.first[:, None])
        full &= within | (bound.last < 0)[:, None]
    return jnp.where(live, jnp.where(full, FULL, PARTIAL), SKIP).astype(jnp.int32)


def corner_states(masks: Masks, lengths: tuple[int, int], blocks: tuple[int, int], *, causal: bool) -> jax.Array:
    """Return the state of every tile as tile_states does, with the corners that can be left out of PARTIAL ones."""
    halves = (blocks[0] // 2, blocks[1] // 2)
    quarters = tile_states(masks, lengths, halves, causal=causal)
    quarters = jnp.pad(quarters, ((0, 0), *((0, size % 2) for size in quarters.shape[1:])))
    quarters = quarters.reshape(quarters.shape[0], quarters.shape[1] // 2, 2, quarters.shape[2] // 2, 2)
    late, early = quarters[:, :, 0, :, 1] == SKIP, quarters[:, :, 1, :, 0] == SKIP
    partial = jnp.where(late, NONE_LATE, jnp.where(early, NONE_EARLY, PARTIAL))
    states = jnp.where(jnp.all(quarters == FULL, axis=(2, 4)), FULL, partial)
    return jnp.where(jnp.all(quarters == SKIP, axis=(2, 4)), SKIP, states).astype(jnp.int32)


class _Summary(NamedTuple):
    """What the table needs to know of each block of queries or keys: arrays [B or 1, tiles]."""

    lowest: jax.Array
    highest: jax.Array
    """Smallest and largest id but 0."""
    first: jax.Array
    last: jax.Array
    """First and last slot whose id is not 0; where there is none, last is -1."""
    whole: jax.Array
    """True where all have one id that is not 0."""


def _summary(segments: jax.Array | None, length: int, block: int, chosen: jax.Array | None = None) -> _Summary:
    """Summarise the blocks of [B, length] segments (None: all 1), of the `chosen` slots only."""
    segments = jnp.ones((1, length), jnp.int32) if segments is None else segments
    if chosen is not None:
        segments = jnp.where(chosen, segments, 0)
    segments = jnp.pad(segments, ((0, 0), (0, -length % block)))
    segments = segments.reshape(segments.shape[0], -1, block)
    slot = jnp.arange(segments.shape[1] * block, dtype=jnp.int32).reshape(1, -1, block)
    real = segments != 0
    lowest = jnp.min(jnp.where(real, segments, INT_MAX), axis=-1)
    highest = jnp.max(jnp.where(real, segments, INT_MIN), axis=-1)
    # Half of the range, so that no difference of slots overflows.
    first = jnp.min(jnp.where(real, slot, INT_MAX // 2), axis=-1)
    last = jnp.max(jnp.where(real, slot, -1), axis=-1)
    return _Summary(lowest, highest, first, last, jnp.all(real, axis=-1) & (lowest == highest))


def _overlap(query: _Summary, key: _Summary) -> jax.Array:
    """Return True where the ids of a block of queries and of a block of keys may meet: [B or 1, nq, nk]."""
    return (query.lowest <= key.highest[:, None]) & (key.lowest[:, None] <= query.highest)


class Steps(NamedTuple):
    """A walk over the visible tiles of all rows, one outer tile after the other; arrays of the greatest length."""

    count: jax.Array
    """int32 []: how many entries count."""
    outer: jax.Array
    """int32: row << 16 | outer tile."""
    inner: jax.Array
    """int32: inner tile << NUM_FLAGS | flags."""


def steps(states: jax.Array, batch: int) -> Steps:
    """List the tiles to visit of states [B or 1, outer, inner], row by row, outer tile by outer tile.

    An outer tile without a visible one has one step that is not LIVE, for its output must be written: it names the
    inner tile of the step before it, so that nothing is fetched for it.
    """
    states = jnp.broadcast_to(states, (batch, *states.shape[1:]))
    _, outer, inner = states.shape
    live = states != SKIP
    empty = ~jnp.any(live, axis=-1, keepdims=True)
    visit = live | (empty & (jnp.arange(inner) == 0)[None, None])
    place = jnp.cumsum(visit, axis=-1, dtype=jnp.int32)
    first, last = place == 1, place == place[..., -1:]
    tile = jnp.arange(outer)[None, :, None]
    flags = FIRST * first + LAST * last + LIVE * live + MASKED * (states >= PARTIAL)
    flags += CUT_LATE * (states == NONE_LATE) + CUT_EARLY * (states == NONE_EARLY)
    flags += ROW_FIRST * (first & (tile == 0)) + ROW_LAST * (last & (tile == outer - 1))
    number = jnp.arange(states.size, dtype=jnp.int32).reshape(states.shape)
    code = jnp.sort(jnp.where(visit, number << NUM_FLAGS | flags.astype(jnp.int32), INT_MAX).reshape(-1))
    tile, flags = code >> NUM_FLAGS, code & ((1 << NUM_FLAGS) - 1)
    fetched = jax.lax.cummax(jnp.where(flags & LIVE != 0, jnp.arange(code.size, dtype=jnp.int32), 0))
    return Steps(
        count=jnp.sum(visit, dtype=jnp.int32),
        outer=(tile // (outer * inner)) << 16 | tile // inner % outer,
        inner=(tile % inner)[fetched] << NUM_FLAGS | flags,
    )


def sorted_tiles(states: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List each row's inner tiles, the FULL ones first, then the PARTIAL ones, then those to skip.

    Args:
      states: [B, outer, inner].

    Returns:
      int32 [B, outer, inner] indices of inner tiles, and int32 [B, outer] how many are FULL and how many are either.
    """
    inner = states.shape[-1]
    rank = jnp.where(states == FULL, 0, jnp.where(states == PARTIAL, 1, 2)) * inner
    order = jnp.sort(rank + jnp.arange(inner, dtype=jnp.int32)[None, None], axis=-1) % inner
    full = jnp.sum(states == FULL, axis=-1, dtype=jnp.int32)
    return order, full, jnp.sum(states != SKIP, axis=-1, dtype=jnp.int32)


def tile_counts(masks: Masks, lengths: tuple[int, int], blocks: tuple[int, int], *, causal: bool) -> dict[str, int]:
    """Count a head's tiles over the rows of the masks: {"visited", "full", "partial", "cut", "total"}.

    Of the partial tiles those are cut of which a TPU leaves out a corner, a quarter; it does if blocks are multiples of
    256.
    """
    states = corner_states(masks, lengths, blocks, causal=causal)
    visited, full, cut = (int(jnp.sum(found)) for found in (states != SKIP, states == FULL, states >= NONE_LATE))
    return {"visited": visited, "full": full, "partial": visited - full, "cut": cut, "total": states.size}
