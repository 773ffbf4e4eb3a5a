"""Products of groups of rows, each with a matrix of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiply consecutive groups of rows, each with its own matrix: [M, F] in x's dtype.

    Args:
      x: [M, D]. w: [E, D, F]. group_sizes: int32 [E]; rows beyond the last group give zeros.
    """
    return _grouped_product(x, w, group_sizes)


def _grouped_forward(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, tuple]:
    return _grouped_product(x, w, group_sizes), (x, w, group_sizes)


def _grouped_backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, group_sizes = saved
    dx = _grouped_product(dy, w.swapaxes(1, 2), group_sizes)
    return dx, _grouped_outer(x, dy, group_sizes).astype(w.dtype), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


# ragged_dot on CPU and GPU is a dense product of all rows with all E matrices, E times the time and memory, and so is
# its weight gradient on TPU; nor does it map over a batch.
@jax.custom_batching.sequential_vmap
def _grouped_product(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    branches = {"tpu": jax.lax.ragged_dot, **_by_height(_tiled_product)}
    y = jax.lax.platform_dependent(x, w, group_sizes, **branches)
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None], y, 0)


@jax.custom_batching.sequential_vmap
def _grouped_outer(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, dy, group_sizes, **_by_height(_tiled_outer))


def _by_height(tiled: Callable) -> dict[str, Callable]:
    """Return the branches by platform; 64 rows were fastest on CPU, elsewhere few tall tiles spare memory traffic."""
    return {"cpu": functools.partial(tiled, height=64), "default": functools.partial(tiled, height=512)}


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
    return jax.lax.fori_loop(0, num_tiles, multiply, y)[: x.shape[0]]


def _tiled_outer(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, height: int) -> jax.Array:
    height = min(height, x.shape[0])
    padded, padded_dy = (jnp.pad(rows, ((0, height), (0, 0))) for rows in (x, dy))
    num_tiles, tile = _tiles(group_sizes, height)

    def add(number: jax.Array, dw: jax.Array) -> jax.Array:
        group, row, end = tile(number)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, height)
        rows = jnp.where((row + jnp.arange(height) < end)[:, None], rows, 0)
        dy = jax.lax.dynamic_slice_in_dim(padded_dy, row, height)
        return dw.at[group].add(jnp.matmul(rows.T, dy, preferred_element_type=dw.dtype))

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.fori_loop(0, num_tiles, add, jnp.zeros((*group_sizes.shape, x.shape[1], dy.shape[1]), dtype))


def _tiles(group_sizes: jax.Array, height: int) -> tuple[jax.Array, Callable[[jax.Array], tuple]]:
    """Cut each group into tiles of `height` rows: return their count and the function to (group, first row, end)."""
    counts = -(-group_sizes // height)
    last_tiles, ends = jnp.cumsum(counts), jnp.cumsum(group_sizes)

    def tile(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.searchsorted(last_tiles, number, side="right")
        row = ends[group] - group_sizes[group] + (number - last_tiles[group] + counts[group]) * height
        return group, row, ends[group]

    return last_tiles[-1], tile
