"""How the TPU flash kernels walk over tiles: the tables they read, blocks and layouts of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tiles
from kernels_pallas.options import LOG2_E, BlockSizes, Options
from kernels_pallas.platform import device_kind
from kernels_pallas.visible import Masks

LANES = 128
_MOST_TILES = 96 * 1024
"""Tiles take 8 bytes each of the scalar memory, 1 MiB on v5e, v5p and v6e."""


class Scalars(NamedTuple):
    """What a kernel must know before its blocks are fetched, in scalar memory.

    Attributes:
      outer, inner: int32 [tiles], see tiles.Steps.
      places: int32 [2]: query_start, window (0 where there is none).
      slopes: float32 [N], of the scores in base 2.
    """

    outer: jax.Array
    inner: jax.Array
    places: jax.Array
    slopes: jax.Array

    def row(self, step: jax.Array) -> jax.Array:
        return self.outer[step] >> 16

    def outer_tile(self, step: jax.Array) -> jax.Array:
        return self.outer[step] & 0xFFFF

    def inner_tile(self, step: jax.Array) -> jax.Array:
        return self.inner[step] >> tiles.NUM_FLAGS

    def flagged(self, step: jax.Array, flag: int) -> jax.Array:
        return self.inner[step] & flag != 0


class Info(NamedTuple):
    """Integers of queries and keys by which a tile is masked; None: the rule has no such part.

    Attributes:
      query_segments: int32 [B, 1, T]. key_segments, prefix: int32 [B, 1, S]. In a kernel: its blocks.
    """

    query_segments: jax.Array | None
    key_segments: jax.Array | None
    prefix: jax.Array | None


class Tile(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      queries, keys: of a tile. alibi, window, segments: whether the scores have a bias, a window, segments.
    """

    queries: int
    keys: int
    options: Options
    alibi: bool
    window: bool
    segments: bool

    @property
    def lanes(self) -> int:
        """Of a column of numbers that fills its registers: a TPU's, or fewer in small tests."""
        return LANES if self.keys % LANES == 0 else self.keys // 2

    @property
    def can_be_halved(self) -> bool:
        """Whether half of the queries and half of the keys still fill registers."""
        return all(block % (2 * self.lanes) == 0 for block in (self.queries, self.keys))

    @property
    def has_late_corners(self) -> bool:
        """Whether there may be tiles whose early queries see no late keys."""
        return self.can_be_halved and (self.options.causal or self.window or self.segments)

    @property
    def has_early_corners(self) -> bool:
        """Whether there may be tiles whose late queries see no early keys."""
        return self.can_be_halved and (self.window or self.segments)


class Walk(NamedTuple):
    """The tiles of one kernel call: count int32 [] steps."""

    tile: Tile
    count: jax.Array
    scalars: Scalars
    info: Info


def default_block_sizes(head_dim: int, masks: Masks) -> BlockSizes:
    """Return the block sizes for the default device, chosen by the static schedules in docs/benchmarks/kernels.md.

    Large tiles cost less a pair, small ones fit windows and documents better.
    """
    if head_dim > 256:
        return BlockSizes((256, 512), (256, 512), (256, 512))
    small, large = (512, 512), (1024, 1024)
    if masks.window is not None or masks.query_segments is not None:
        return BlockSizes(small, small, small)
    # Only where the matrix units are 256 wide is the backward pass much faster by large tiles, which compile slowly.
    backward = large if "v6" in device_kind() else small
    return BlockSizes(large, backward, backward)


def walk(
    masks: Masks,
    slopes: jax.Array | None,
    options: Options,
    blocks: tuple[int, int],
    q: jax.Array,
    k: jax.Array,
) -> Walk:
    """Plan the tiles of one kernel for q [B, T, N, H] and k [B, S, K, H].

    Args:
      blocks: (queries, keys) of a tile.

    Raises:
      ValueError: blocks a TPU cannot take, or more tiles than its scalar memory has room for.
    """
    batch, lengths = q.shape[0], (q.shape[1], k.shape[1])
    if any(block <= 0 or block % (min(LANES, block) if options.interpret else LANES) for block in blocks):
        raise ValueError(f"block_sizes: found {blocks}, expected multiples of {LANES}")
    blocks = tuple(min(block, _round_up(size, LANES)) for block, size in zip(blocks, lengths, strict=True))
    if masks.query_segments is None and any(size % block for size, block in zip(lengths, blocks, strict=True)):
        query, key = (jnp.ones((batch, size), jnp.int32) for size in lengths)
        masks = masks._replace(query_segments=query, key_segments=key)
    given = (x is not None for x in (slopes, masks.window, masks.query_segments))
    tile = Tile(*blocks, options, *given)
    find_states = tiles.corner_states if tile.can_be_halved else tiles.tile_states
    states = find_states(masks, lengths, blocks, causal=options.causal)
    if batch * states[0].size > _MOST_TILES:
        raise ValueError(
            f"block_sizes: found {blocks}, {batch * states[0].size} tiles for {batch} rows of {lengths[0]} queries and "
            f"{lengths[1]} keys; expected at most {_MOST_TILES} tiles: larger blocks or fewer rows"
        )
    steps = tiles.steps(states, batch)
    window = jnp.int32(0) if masks.window is None else masks.window
    slopes_2 = jnp.zeros(q.shape[2]) if slopes is None else slopes * LOG2_E
    return Walk(
        tile,
        steps.count,
        Scalars(steps.outer, steps.inner, jnp.stack([masks.query_start, window]), slopes_2.astype(jnp.float32)),
        Info(*map(as_row, (masks.query_segments, masks.key_segments, masks.prefix), (blocks[0], blocks[1], blocks[1]))),
    )


def heads_first(x: jax.Array, block: int) -> jax.Array:
    """Lay [B, T, N, H] out as [B, N, T, H], T padded to whole blocks."""
    return _padded(jnp.swapaxes(x, 1, 2), 2, block)


def heads_last(x: jax.Array, length: int) -> jax.Array:
    """Lay [B, N, T, H] out as [B, T, N, H], cut to length."""
    return jnp.swapaxes(x[:, :, :length], 1, 2)


def as_row(x: jax.Array | None, block: int) -> jax.Array | None:
    """Lay [..., T] out as [..., 1, T], T padded to whole blocks: the last two axes of a block must tile a register."""
    return None if x is None else jnp.expand_dims(_padded(x, x.ndim - 1, block), -2)


def _padded(x: jax.Array, axis: int, block: int) -> jax.Array:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, width)


def _round_up(size: int, multiple: int) -> int:
    return size + -size % multiple


At = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""From a step of the grid (indices, then Scalars) to (row, head, tile)."""


def columns(block: int, width: int, at: At) -> pl.BlockSpec:
    """Return the blocks [block, width] of [B, heads, T, width]."""
    return pl.BlockSpec((None, None, block, width), lambda *step: (*at(*step), 0))


def row(block: int, at: At) -> pl.BlockSpec:
    """Return the blocks [1, block] of [B, heads, 1, T]."""

    def place(*step):
        batch, head, tile = at(*step)
        return batch, head, 0, tile

    return pl.BlockSpec((None, None, 1, block), place)


def row_of_all_heads(x: jax.Array | None, block: int, at: At) -> pl.BlockSpec | None:
    """Return the blocks [1, block] of x [B, 1, T]."""

    def place(*step):
        batch, _, tile = at(*step)
        return batch, 0, tile

    return None if x is None else pl.BlockSpec((None, 1, block), place)


def info_rows(info: Info, tile: Tile, query_at: At, key_at: At) -> Info:
    """Return the blocks [1, block] of the info's [B, 1, T]."""
    return Info(
        row_of_all_heads(info.query_segments, tile.queries, query_at),
        row_of_all_heads(info.key_segments, tile.keys, key_at),
        row_of_all_heads(info.prefix, tile.keys, key_at),
    )


def vmem_limit(options: Options) -> int:
    """Return how many bytes of the default device's vector memory a kernel may take."""
    return 7 * (64 * 2**20 if options.interpret else pltpu.get_tpu_info().vmem_capacity_bytes) // 8
