"""Products of groups of rows, each with a matrix of its own, and their weight gradients, for TPU.

A grid step is one visit of a group to a tile of rows. Groups start and end anywhere: a tile that several groups share
is visited by each, one after the other, and a visit computes only the blocks of rows in which its group has some. How
many visits there are is data, so one compiled kernel serves all group sizes, and time grows with the rows that lie in
groups.

Why not what jax has (0.10.2, compiled by libtpu 0.0.42 for v5e, v5p and v6e; 24,576 rows of 2,048 and 64 matrices of
2,048 x 1,408, bfloat16: a product is 1.4e11 FLOPs):
- `lax.ragged_dot` is such a kernel too, where the compiler can make one. Where it cannot (24,613 rows: no multiple of
  8) it multiplies all rows with all matrices, 9.1e12 FLOPs, and its weight gradient always does. Given transposed
  matrices, for the gradient of x, it copies them first (352 MiB), and rows of no group need a pass of their own.
- megablox' gmm and tgmm refuse rows that do not divide into tiles, leave rows of no group undefined, and take one
  tiling for all passes from the caller: (512, 1024, 1408) is more than tgmm's memory on v5e.
- Length of the schedule for 128 rows and all columns, in cycles: on v5e ragged_dot 6,477, this 4,545, transposed 5,203,
  `outer` 5,836; on v6e 1,665 (in blocks of 256 rows), 1,794, 2,369 and 1,714 (in blocks of 256).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.platform import device_kind

# Rows of a tile, which are fetched, and of its blocks, which are multiplied. Smaller blocks waste less at the edges of
# groups, but the matrix units come to wait: below 128 for their weights and, where they are 256 wide, in `outer` for
# the stores of the sums.
_TILE, _BLOCK = 512, 128
_WIDE_UNITS, _TWO_CORES = ("TPU v6", "TPU7x"), ("TPU v4", "TPU v5", "TPU v5p")
_SUBLANES, _LANES = 16, 128
# What a step may hold at all, in one block of an operand, and in a block of sums and its result.
_VMEM_BYTES, _OPERAND_BYTES, _SUM_BYTES = 56 * 2**20, 8 * 2**20, 24 * 2**20
# The longest row of x: a block of such rows and one of weights, each twice, leave room for the rest.
_ROW_BYTES = 96 * 2**10


class Visits(NamedTuple):
    """Which group visits which tile of rows, in order; group E stands for the rows of no group.

    Attributes:
      offsets: int32 [E + 2], group g has the rows offsets[g] <= row < offsets[g + 1].
      group, tile: int32 [W], of each visit; entries past the number of visits repeat the last.
    """

    offsets: jax.Array
    group: jax.Array
    tile: jax.Array


def product(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, expected_rows: int, transposed: bool, interpret: bool
) -> jax.Array:
    """Return each row times its group's matrix, in x's dtype; rows of no group give zeros.

    Args:
      x: [M, D]. w: [E, D, F], or [E, F, D] if `transposed`. group_sizes: int32 [E].
      expected_rows: of groups, for the cost estimate.

    Raises:
      ValueError: the rows of x are too long for the chip's memory.
    """
    rows, depth = x.shape
    if depth * x.dtype.itemsize > _ROW_BYTES:
        most = _ROW_BYTES // x.dtype.itemsize
        raise ValueError(f"rows to multiply: found {depth} numbers of {x.dtype}, expected at most {most}")
    num_groups, width = w.shape[0], w.shape[1 if transposed else 2]
    height, block = _heights(rows, _BLOCK, depth * x.dtype.itemsize)
    columns = _part(width, max(depth, height) * w.dtype.itemsize, _OPERAND_BYTES, least=_cores())
    visits, count = _visits(group_sizes, rows, height, every_group=False)

    def rows_of(column, visit, offsets, group, tile):
        """Stay at the last tile with rows of a group when there is nothing to multiply."""
        return jnp.minimum(tile[visit], jnp.maximum(offsets[num_groups] - 1, 0) // height), 0

    def weights_of(column, visit, offsets, group, tile):
        matrix = jnp.minimum(group[visit], num_groups - 1)
        return (matrix, column, 0) if transposed else (matrix, 0, column)

    moved = (expected_rows * depth + rows * width + w.size) * x.dtype.itemsize
    call = pl.pallas_call(
        functools.partial(_product_body, height=height, block=block, num_groups=num_groups, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(width, columns), count),
            in_specs=[
                pl.BlockSpec((height, depth), rows_of),
                pl.BlockSpec((None, columns, depth) if transposed else (None, depth, columns), weights_of),
            ],
            out_specs=pl.BlockSpec(
                (height, columns), lambda column, visit, offsets, group, tile: (tile[visit], column)
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(expected_rows, depth, width, moved),
        name="jaxllm_grouped_matmul",
        interpret=interpret,
    )
    return call(*visits, x, w)


def _product_body(offsets, group, tile, x, w, y, *, height, block, num_groups, transposed):
    visit = pl.program_id(1)
    matrix, first_row = group[visit], tile[visit] * height
    start, end = offsets[matrix] - first_row, offsets[matrix + 1] - first_row

    def write(number, compute):
        first = pl.multiple_of(number * block, block)
        rows = pl.ds(first, block)
        row = first + jax.lax.broadcasted_iota(jnp.int32, (block, y.shape[1]), 0)
        y[rows] = jnp.where((row >= start) & (row < end), compute(rows), y[rows])

    def multiply(rows):
        return _dot(x[rows], w[...], (1, 1 if transposed else 0)).astype(y.dtype)

    def visit_blocks(compute):
        jax.lax.fori_loop(*_blocks(start, end, height, block), lambda number, _: write(number, compute), None)

    pl.when(matrix < num_groups)(lambda: visit_blocks(multiply))
    pl.when(matrix == num_groups)(lambda: visit_blocks(lambda rows: jnp.zeros((block, y.shape[1]), y.dtype)))


def outer(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    *,
    expected_rows: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> jax.Array:
    """Return x^T dy of each group's rows, [E, D, F] in `dtype`; empty groups give zeros.

    Args:
      x: [M, D]. dy: [M, F]. group_sizes: int32 [E].
      expected_rows: of groups, for the cost estimate.
    """
    (rows, depth), width, num_groups = x.shape, dy.shape[1], group_sizes.shape[0]
    bytes_per_sum = 4 + 2 * jnp.dtype(dtype).itemsize
    columns = _part(width, bytes_per_sum * min(depth, 1024), _SUM_BYTES)
    depths = _part(depth, bytes_per_sum * columns, _SUM_BYTES, least=_cores())
    block = 2 * _BLOCK if device_kind().startswith(_WIDE_UNITS) else _BLOCK
    height, block = _heights(rows, block, max(depths, columns) * x.dtype.itemsize)
    visits, count = _visits(group_sizes, rows, height, every_group=True)
    sums = num_groups * depth * width * jnp.dtype(dtype).itemsize
    moved = expected_rows * (depth + width) * x.dtype.itemsize + sums
    call = pl.pallas_call(
        functools.partial(_outer_body, height=height, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(depth, depths), pl.cdiv(width, columns), count),
            in_specs=[
                pl.BlockSpec((height, depths), lambda d, f, visit, offsets, group, tile: (tile[visit], d)),
                pl.BlockSpec((height, columns), lambda d, f, visit, offsets, group, tile: (tile[visit], f)),
            ],
            out_specs=pl.BlockSpec(
                (None, depths, columns), lambda d, f, visit, offsets, group, tile: (group[visit], d, f)
            ),
            scratch_shapes=[pltpu.VMEM((depths, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_groups, depth, width), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(expected_rows, depth, width, moved),
        name="jaxllm_grouped_outer",
        interpret=interpret,
    )
    return call(*visits, x, dy)


def _outer_body(offsets, group, tile, x, dy, dw, total, *, height, block):
    visit, last_visit = pl.program_id(2), pl.num_programs(2) - 1
    matrix, first_row = group[visit], tile[visit] * height
    start, end = offsets[matrix] - first_row, offsets[matrix + 1] - first_row

    is_first = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != matrix)
    blocks = _blocks(start, end, height, block)

    def add(number, _):
        first = pl.multiple_of(number * block, block)
        # Cheaper than a pass that sets the sum to zero.
        before = jnp.where(is_first & (number == blocks[0]), 0, total[...])

        def own(operand):
            row = first + jax.lax.broadcasted_iota(jnp.int32, (block, operand.shape[1]), 0)
            return jnp.where((row >= start) & (row < end), operand[pl.ds(first, block)], 0)

        # Both, because what lies past the last row may be NaN.
        total[...] = before + _dot(own(x), own(dy), (0, 0))

    jax.lax.fori_loop(*blocks, add, None)

    @pl.when((visit == last_visit) | (group[jnp.minimum(visit + 1, last_visit)] != matrix))
    def _():
        dw[...] = jnp.where(end > start, total[...], 0).astype(dw.dtype)


def _visits(group_sizes: jax.Array, rows: int, height: int, *, every_group: bool) -> tuple[Visits, jax.Array]:
    """Return the visits and their number: of every group, also empty ones, or of all rows, also those of no group."""
    num_tiles, num_groups = pl.cdiv(rows, height), group_sizes.shape[0]
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, rows, jnp.int32)])
    start, end = offsets[:-1], offsets[1:]
    tiles = jnp.where(end > start, -(-end // height) - start // height, 0)
    if every_group:
        tiles = jnp.maximum(tiles, 1).at[num_groups].set(0)
    last = jnp.cumsum(tiles)
    # A tile has one visit, and one more for each group after the first that has rows in it.
    visit = jnp.minimum(jnp.arange(num_tiles + num_groups), last[-1] - 1)
    group = jnp.searchsorted(last, visit, side="right", method="compare_all").astype(jnp.int32)
    tile = jnp.minimum(start[group] // height + visit - (last - tiles)[group], num_tiles - 1)
    return Visits(offsets, group, tile.astype(jnp.int32)), last[-1]


def _blocks(start: jax.Array, end: jax.Array, height: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Return the first and the end of a tile's blocks with a row start <= row < end."""
    first = jnp.maximum(start, 0) // block
    return first, jnp.maximum(first, (jnp.minimum(end, height) + block - 1) // block)


def _heights(rows: int, block: int, bytes_per_row: int) -> tuple[int, int]:
    """Return the rows of a tile and of its blocks; few rows are one block of whole sublanes."""
    if rows < block:
        block = pl.cdiv(rows, _SUBLANES) * _SUBLANES
    most = max(min(_TILE, _OPERAND_BYTES // bytes_per_row) // block, 1)
    return min(most, pl.cdiv(rows, block)) * block, block


def _part(size: int, bytes_each: int, most: int, *, least: int = 1) -> int:
    """Return the length, in whole lanes or all, of equal parts of `size`: `least` or more of about `most` bytes."""
    parts = max(pl.cdiv(size * bytes_each, most), least)
    return min(size, pl.cdiv(pl.cdiv(size, parts), _LANES) * _LANES)


def _cores() -> int:
    return 2 if device_kind() in _TWO_CORES else 1


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Return the float32 product; float32 inputs are not rounded to bfloat16."""
    exact = jax.lax.Precision.HIGHEST if jnp.float32 in (a.dtype, b.dtype) else None
    dimensions = ((contracted[:1], contracted[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def _cost(rows: int, depth: int, width: int, num_bytes: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * rows * depth * width, transcendentals=0, bytes_accessed=num_bytes)
