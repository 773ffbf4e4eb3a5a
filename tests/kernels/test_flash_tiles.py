"""The tables of tiles against a count of all pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_numpy import visible_pairs
from flash_cases import packed_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import tiles
from kernels_pallas.visible import Masks

LENGTH = 150


def as_masks(case, query_start=0):
    segments = jnp.asarray(case["segment_ids"])
    return Masks(
        segments, segments, jnp.asarray(case["prefix_mask"], jnp.int32), jnp.int32(case["window"]), query_start
    )


def by_tile(pairs, blocks, reduce, fill):
    """Reduce bool [B, T, S] over tiles; what the last tiles lack is `fill`."""
    (_, length, slots), (queries, keys) = pairs.shape, blocks
    pairs = np.pad(pairs, ((0, 0), (0, -length % queries), (0, -slots % keys)), constant_values=fill)
    batch, length, slots = pairs.shape
    return reduce(pairs.reshape(batch, length // queries, queries, slots // keys, keys), axis=(2, 4))


def brute_force(pairs, blocks):
    """Return the states of tiles from all pairs; short tiles are never full."""
    full = by_tile(pairs, blocks, np.all, fill=False)
    return np.where(by_tile(pairs, blocks, np.any, fill=False), np.where(full, tiles.FULL, tiles.PARTIAL), tiles.SKIP)


@functools.partial(jax.jit, static_argnames=("blocks", "causal"))
def states_and_steps(masks, blocks, causal):
    states = tiles.tile_states(masks, (LENGTH, LENGTH), blocks, causal=causal)
    return states, tiles.steps(states, 2), tiles.sorted_tiles(states)


@settings(max_examples=60)
@given(packed_rows(), st.sampled_from([(32, 32), (16, 64), (64, 16)]))
def test_tiles_are_exact_for_packed_documents(case, blocks):
    states, _, _ = states_and_steps(as_masks(case), blocks, True)
    pairs = visible_pairs(2, LENGTH, LENGTH, **case)
    np.testing.assert_array_equal(states, brute_force(pairs, blocks))


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.booleans())
def test_no_visible_pair_is_missed_whatever_the_ids(seed, causal):
    rng = np.random.default_rng(seed)
    case = {
        "segment_ids": rng.integers(-1, 3, (2, LENGTH)).astype(np.int32),
        "prefix_mask": rng.random((2, LENGTH)) < 0.02,
        "window": int(rng.integers(0, LENGTH)),
    }
    states, _, _ = states_and_steps(as_masks(case), (16, 32), causal)
    least = brute_force(visible_pairs(2, LENGTH, LENGTH, causal=causal, **case), (16, 32))
    assert (np.asarray(states)[least != tiles.SKIP] != tiles.SKIP).all()
    assert (least[np.asarray(states) == tiles.FULL] == tiles.FULL).all()


@settings(max_examples=30)
@given(packed_rows())
def test_steps_visit_every_live_tile_once_and_every_outer_tile(case):
    states, steps, (order, full, live) = jax.tree.map(np.asarray, states_and_steps(as_masks(case), (16, 64), True))
    outer, inner = (x[: steps.count] for x in (steps.outer, steps.inner))
    row, outer_tile, inner_tile = outer >> 16, outer & 0xFFFF, inner >> tiles.NUM_FLAGS
    computed = inner & tiles.LIVE != 0
    visited = list(zip(row[computed], outer_tile[computed], inner_tile[computed], strict=True))
    assert visited == list(zip(*np.nonzero(states), strict=True))
    np.testing.assert_array_equal((inner & tiles.MASKED != 0)[computed], states[states != 0] == tiles.PARTIAL)
    fetched = np.stack([row, inner_tile])
    assert (computed[1:] | (fetched[1, 1:] == fetched[1, :-1])).all(), "a dead step fetches another tile"
    for flag, names in ((tiles.FIRST, (row, outer_tile)), (tiles.ROW_FIRST, (row,))):
        starts = np.any([np.diff(name, prepend=-1) != 0 for name in names], axis=0)
        np.testing.assert_array_equal(inner & flag != 0, starts)
        np.testing.assert_array_equal(inner & (flag * 2) != 0, np.append(starts[1:], True))
    assert len(set(zip(row, outer_tile, strict=True))) == states.shape[0] * states.shape[1]
    np.testing.assert_array_equal(full, (states == tiles.FULL).sum(-1))
    np.testing.assert_array_equal(live, (states != tiles.SKIP).sum(-1))
    ranks = np.take_along_axis(np.array([2, 0, 1])[states], order, axis=-1)
    assert (np.diff(ranks, axis=-1) >= 0).all()


@pytest.mark.parametrize(("length", "slots", "start"), [(70, 200, 90), (200, 70, 0), (33, 65, 32)])
def test_tiles_are_exact_where_queries_start_late(length, slots, start):
    masks = Masks(window=jnp.int32(40), query_start=start)
    found = tiles.tile_states(masks, (length, slots), (16, 32), causal=True)
    pairs = visible_pairs(1, length, slots, query_start=start, window=40)
    np.testing.assert_array_equal(found, brute_force(pairs, (16, 32)))


@settings(max_examples=40)
@given(packed_rows(), st.sampled_from([(32, 32), (16, 64)]))
def test_corners_are_left_out_exactly_where_nobody_sees(case, blocks):
    states = np.asarray(corner_states(as_masks(case), blocks))
    pairs = visible_pairs(2, LENGTH, LENGTH, **case)
    whole = brute_force(pairs, blocks)
    np.testing.assert_array_equal(np.minimum(states, tiles.PARTIAL), whole)
    quarters = by_tile(pairs, tuple(block // 2 for block in blocks), np.any, fill=False)
    quarters = np.pad(quarters, ((0, 0), *((0, size % 2) for size in quarters.shape[1:])))
    late, early = quarters[:, ::2, 1::2], quarters[:, 1::2, ::2]
    partial = whole == tiles.PARTIAL
    np.testing.assert_array_equal(states == tiles.NONE_LATE, partial & ~late)
    np.testing.assert_array_equal(states == tiles.NONE_EARLY, partial & late & ~early)


@functools.partial(jax.jit, static_argnames="blocks")
def corner_states(masks, blocks):
    return tiles.corner_states(masks, (LENGTH, LENGTH), blocks, causal=True)


@pytest.mark.parametrize("block", [256, 512])
def test_a_window_of_1024_at_32768_costs_a_twelfth(block):
    whole, window = (
        tiles.tile_counts(Masks(window=size), (32768, 32768), (block, block), causal=True)
        for size in (None, jnp.int32(1024))
    )
    size = 32768 // block
    diagonals = 1024 // block
    assert whole == {
        "visited": size * (size + 1) // 2,
        "full": size * (size - 1) // 2,
        "partial": size,
        "cut": size,
        "total": size**2,
    }
    assert window["visited"] == sum(size - offset for offset in range(diagonals + 1))
    assert window["cut"] == window["partial"] == size + size - diagonals
    computed_whole, computed = (counts["visited"] - counts["cut"] / 4 for counts in (whole, window))
    assert computed * 12 <= computed_whole
