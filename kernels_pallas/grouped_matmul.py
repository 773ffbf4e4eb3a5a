"""Products of groups of rows, each with a matrix of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import grouped_tpu
from kernels_pallas.platform import implementation

# Rows of a tile of the loops: 64 were fastest on CPU; on a GPU few tall tiles spare memory traffic.
_TILE_ROWS = {"reference": 64, "gpu": 512}


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    expected_rows: int | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply consecutive groups of rows, each with its own matrix: [M, F] in x's dtype, summed in float32.

    Differentiable in x and w; vmap goes through a batch one element at a time. Every implementation multiplies rows
    with the matrices of their own group alone, apart from the edges of tiles: lax.ragged_dot, which on CPU and GPU
    multiplies all rows with all matrices (E times the time and memory), serves none. Why not on TPU: see grouped_tpu.

    Args:
      x: [M, D]. w: [E, D, F]. group_sizes: int [E]; rows beyond the last group give zeros.
      expected_rows: how many lie in groups on average, if not all: what the TPU kernels say that they cost.
      impl: "tpu" (a Pallas kernel), "gpu" or "reference" (loops over tiles of rows, XLA code); None: by device.
      interpret: run the TPU kernel on a CPU.

    Raises:
      ValueError: an argument that does not fit; the message names it, what was found and expected.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        found = f"x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape}"
        raise ValueError(f"found shapes {found}, expected x [M, D], w [E, D, F], group_sizes [E]")
    if x.dtype != w.dtype:
        raise ValueError(f"w: found dtype {w.dtype}, expected x's, {x.dtype}")
    impl = implementation(impl, interpret)
    if impl == "tpu" and x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f'x: found dtype {x.dtype}, expected float32 or bfloat16 (impl="reference" takes others)')
    if x.size == 0 or w.size == 0:
        raise ValueError(f"found empty arrays, x {x.shape}, w {w.shape}; expected at least one element")
    options = _Options(impl, interpret, x.shape[0] if expected_rows is None else expected_rows)
    return _grouped_matmul(x, w, group_sizes, options)


class _Options(NamedTuple):
    impl: str
    interpret: bool
    expected_rows: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, options: _Options) -> jax.Array:
    return _product(x, w, group_sizes, options, transposed=False)


def _forward(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, options: _Options
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _product(x, w, group_sizes, options, transposed=False), (x, w, group_sizes)


def _backward(
    options: _Options, saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, group_sizes = saved
    dx = _product(dy, w, group_sizes, options, transposed=True)
    return dx, _outer(x, dy, group_sizes, options, w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _product(x, w, group_sizes, options, *, transposed):
    impl, interpret, expected_rows = options
    if impl == "tpu":
        compute = functools.partial(
            grouped_tpu.product, expected_rows=expected_rows, transposed=transposed, interpret=interpret
        )
    else:
        compute = functools.partial(_tiled_product, height=_TILE_ROWS[impl])
        w = w.swapaxes(1, 2) if transposed else w
    return jax.custom_batching.sequential_vmap(compute)(x, w, group_sizes)


def _outer(x, dy, group_sizes, options, dtype):
    impl, interpret, expected_rows = options
    if impl == "tpu":
        compute = functools.partial(grouped_tpu.outer, expected_rows=expected_rows, dtype=dtype, interpret=interpret)
    else:
        compute = functools.partial(_tiled_outer, height=_TILE_ROWS[impl], dtype=dtype)
    return jax.custom_batching.sequential_vmap(compute)(x, dy, group_sizes)


def _tiled_product(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, height: int) -> jax.Array:
    height = min(height, x.shape[0])
    padded = jnp.pad(x, ((0, height), (0, 0)))
    num_tiles, tile = _tiles(group_sizes, height)

    def multiply(number: jax.Array, y: jax.Array) -> jax.Array:
        group, row, _ = tile(number)
        product = jax.lax.dynamic_slice_in_dim(padded, row, height) @ w[group]
        # The rows past the group's end are the next tile's, which overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(y, product, row, axis=0)

    y = jnp.zeros((padded.shape[0], w.shape[2]), x.dtype)
    y = jax.lax.fori_loop(0, num_tiles, multiply, y)[: x.shape[0]]
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None], y, 0)


def _tiled_outer(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, height: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    height = min(height, x.shape[0])
    padded, padded_dy = (jnp.pad(rows, ((0, height), (0, 0))) for rows in (x, dy))
    num_tiles, tile = _tiles(group_sizes, height)

    def add(number: jax.Array, dw: jax.Array) -> jax.Array:
        group, row, end = tile(number)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, height)
        rows = jnp.where((row + jnp.arange(height) < end)[:, None], rows, 0)
        dy = jax.lax.dynamic_slice_in_dim(padded_dy, row, height)
        return dw.at[group].add(jnp.matmul(rows.T, dy, preferred_element_type=dw.dtype))

    wide = jnp.promote_types(x.dtype, jnp.float32)
    dw = jnp.zeros((*group_sizes.shape, x.shape[1], dy.shape[1]), wide)
    return jax.lax.fori_loop(0, num_tiles, add, dw).astype(dtype)


def _tiles(group_sizes: jax.Array, height: int) -> tuple[jax.Array, Callable[[jax.Array], tuple]]:
    """Cut each group into tiles of `height` rows: return their count and the function to (group, first row, end)."""
    counts = -(-group_sizes // height)
    last_tiles, ends = jnp.cumsum(counts), jnp.cumsum(group_sizes)

    def tile(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.searchsorted(last_tiles, number, side="right")
        row = ends[group] - group_sizes[group] + (number - last_tiles[group] + counts[group]) * height
        return group, row, ends[group]

    return last_tiles[-1], tile
