"""What the GPU kernels share: which tiles a program walks along, how they are read, multiplied, scored and masked.

The kernels are Triton's by way of Pallas, which takes only arrays whose sizes are powers of two. So a head dim such as
192 is cut into pieces, 128 + 64, each loaded and multiplied by itself: nothing is padded to 256. Arrays stay as the
caller laid them out, [B, T, N, H]: a kernel sees all of them and reads the rows it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels_pallas.options import LOG2_E, Options
from kernels_pallas.tiles import sorted_tiles, tile_states
from kernels_pallas.visible import Masks, visible

Carry = TypeVar("Carry")

MASKED = -2e38
"""The score of a pair that is not visible: so far below NOTHING_SEEN that its exponential is 0 in every row."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for: the tile's size (queries, keys), and how its scores come about.

    Tiles of scores are [queries, keys], or [keys, queries] where a program sums over the queries, `by_keys`.
    """

    blocks: tuple[int, int]
    slots: int
    """How many keys there are; those after them pad the arrays."""
    options: Options
    by_keys: bool = False

    def queries(self, index: jax.Array) -> pl.Slice:
        """Return the rows of a tile of queries."""
        return pl.ds(index * self.blocks[0], self.blocks[0])

    def keys(self, index: jax.Array) -> pl.Slice:
        """Return the slots of a tile of keys."""
        return pl.ds(index * self.blocks[1], self.blocks[1])

    def along_queries(self, x: jax.Array) -> jax.Array:
        """Lay a vector of the queries along their axis of the scores."""
        return x[None] if self.by_keys else x[:, None]

    def along_keys(self, x: jax.Array) -> jax.Array:
        """Lay a vector of the keys along their axis of the scores."""
        return x[:, None] if self.by_keys else x[None]

    def scores(
        self,
        product: jax.Array,
        query_scale: jax.Array | None,
        masks: Masks,
        slope: jax.Array | None,
        row: jax.Array,
        place: tuple[jax.Array, jax.Array],
        masked: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the scores, exponents of 2, and the derivative of the soft cap where there is one.

        Args:
          product: float32, of queries and keys. query_scale: float32 [queries].
          masks: references to arrays, and numbers (`read_numbers`).
          slope: float32 [], ALiBi's. place: the indices of the tile of queries and the tile of keys.
        """
        factor, cap_slope = self.options.factor, None
        scores = product * (factor if query_scale is None else self.along_queries(query_scale * factor))
        if self.options.soft_cap is not None:
            capped = jnp.tanh(scores)
            scores, cap_slope = self.options.soft_cap * LOG2_E * capped, 1 - capped * capped
        if slope is None and not masked:
            return scores, cap_slope
        queries, keys = self.queries(place[0]), self.keys(place[1])
        key = self.along_keys(_slots(keys))
        distance = masks.query_start + self.along_queries(_slots(queries)) - key
        if slope is not None:
            scores -= slope * LOG2_E * jnp.abs(distance).astype(jnp.float32)
        if masked:
            sees = visible(
                distance,
                self.options.causal,
                masks.window,
                None if masks.query_segments is None else self.along_queries(masks.query_segments[row, queries]),
                None if masks.key_segments is None else self.along_keys(masks.key_segments[row, keys]),
                None if masks.prefix is None else self.along_keys(masks.prefix[row, keys]),
            )
            real = key < self.slots
            scores = jnp.where(real if sees is None else real & sees, scores, MASKED)
        return scores, cap_slope

    def inner(self, xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
        """Multiply two tiles along the head dim that cuts both into pieces: [m, H] and [n, H] to float32 [m, n]."""
        return sum(self._dot(x, y, (1, 1)) for x, y in zip(xs, ys, strict=True))

    def add_product(self, sums: Sequence[jax.Array], x: jax.Array, ys: Sequence[jax.Array]) -> list[jax.Array]:
        """Add to float32 sums [m, H] the product of x [m, n], rounded to y's dtype, and y [n, H], in pieces."""
        return [total + self._dot(x.astype(y.dtype), y, (1, 0)) for total, y in zip(sums, ys, strict=True)]

    def _dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        precision = None
        if x.dtype == jnp.float32:
            # Tensor cores multiply float32 by three products of TF32, of a relative error of 2**-21; a CPU does not.
            tensor_cores = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            precision = jax.lax.Precision.HIGHEST if self.options.interpret else tensor_cores
        dimensions = (((axes[0],), (axes[1],)), ((), ()))
        return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def exp2(self, x: jax.Array) -> jax.Array:
        """Return 2**x, of a relative error of 2**-22; 0 where it would be subnormal."""
        if self.options.interpret:
            return jnp.exp2(x)
        # jnp.exp2 keeps subnormal numbers, at three more instructions for each score.
        (y,) = triton.elementwise_inline_asm(
            "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.typeof(x)]
        )
        return y


class Tables(NamedTuple):
    """The visible tiles of each outer tile: of queries, or of keys where a kernel sums over the queries."""

    order: jax.Array
    """int32 [B or 1, outer, inner]: inner tiles, those that need no mask first."""
    full: jax.Array
    """int32 [B or 1, outer]: how many need no mask."""
    live: jax.Array
    """int32 [B or 1, outer]: how many are to be computed."""


def tables(masks: Masks, length: int, tile: Tile) -> Tables:
    """List the visible tiles of a mask over `length` queries."""
    states = tile_states(masks, (length, tile.slots), tile.blocks, causal=tile.options.causal)
    return Tables(*sorted_tiles(jnp.swapaxes(states, 1, 2) if tile.by_keys else states))


def over_tiles(
    tables: Tables,
    row: jax.Array,
    outer: jax.Array,
    body: Callable[[jax.Array, jax.Array, bool, Carry], Carry],
    carry: Carry,
    repeats: int = 1,
) -> Carry:
    """Fold body(inner tile, repeat, masked, carry) over an outer tile's full tiles, then over its partial ones."""
    row = row if tables.full.shape[0] > 1 else 0

    def step(masked: bool, index: jax.Array, carry: Carry) -> Carry:
        inner = tables.order[row, outer, jax.lax.div(index, jnp.int32(repeats))]
        return body(inner, jax.lax.rem(index, jnp.int32(repeats)), masked, carry)

    full, live = tables.full[row, outer] * repeats, tables.live[row, outer] * repeats
    carry = jax.lax.fori_loop(jnp.int32(0), full, lambda index, carry: step(False, index, carry), carry)
    return jax.lax.fori_loop(full, live, lambda index, carry: step(True, index, carry), carry)


def mask_arrays(masks: Masks, tile: Tile) -> Masks:
    """Return masks as the kernels read them: segments and prefix padded to whole tiles, numbers of shape [1]."""
    queries, keys = tile.blocks
    return Masks(
        query_segments=None if masks.query_segments is None else pad(masks.query_segments, {1: queries}),
        key_segments=None if masks.key_segments is None else pad(masks.key_segments, {1: keys}),
        prefix=None if masks.prefix is None else pad(masks.prefix, {1: keys}),
        window=None if masks.window is None else masks.window.reshape(1),
        query_start=jnp.asarray(masks.query_start, jnp.int32).reshape(1),
    )


def read_numbers(masks: Masks) -> Masks:
    """Read, once for a program, what is no array."""
    window = None if masks.window is None else masks.window[0]
    return masks._replace(window=window, query_start=masks.query_start[0])


def pad(x: jax.Array, multiples: dict[int, int]) -> jax.Array:
    """Pad x with zeros until the axes named are multiples of the numbers given."""
    widths = [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(end for _, end in widths) else x


def load(ref: jax.Ref, row: jax.Array, slots: pl.Slice, head: jax.Array) -> list[jax.Array]:
    """Read [slots, H] of [B, T, N, H], in pieces."""
    return [ref[row, slots, head, piece] for piece in pieces(ref.shape[-1])]


def store(ref: jax.Ref, row: jax.Array, slots: pl.Slice, head: jax.Array, values: Sequence[jax.Array]) -> None:
    """Write [slots, H] of [B, T, N, H], in pieces."""
    for piece, value in zip(pieces(ref.shape[-1]), values, strict=True):
        ref[row, slots, head, piece] = value.astype(ref.dtype)


def zeros(size: int, width: int) -> list[jax.Array]:
    """Return float32 sums [size, width], in pieces."""
    return [jnp.zeros((size, piece.size), jnp.float32) for piece in pieces(width)]


def pieces(width: int) -> list[pl.Slice]:
    """Cut a head dim into powers of two, the largest first."""
    cuts = []
    start = 0
    while start < width:
        cuts.append(pl.ds(start, 1 << (width - start).bit_length() - 1))
        start += cuts[-1].size
    return cuts


def _slots(span: pl.Slice) -> jax.Array:
    return span.start + jax.lax.iota(jnp.int32, span.size)
