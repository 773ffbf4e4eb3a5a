"""Functions that bench_kernels.py compiles for chips that are not there, each with its arguments' shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import megablox

from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.grouped_matmul import grouped_matmul

Case = tuple[Callable, list[jax.ShapeDtypeStruct]]

LENGTH = 4096
HEADS, KV_HEADS = 2, 1
"""Few heads, for a schedule does not depend on them, and XLA's copies round the kernels take long to compile."""
FLASH = {"128": ((128, 128), False), "128, window + segments": ((128, 128), True), "MLA 192/128": ((192, 128), False)}
"""Head dims of queries and keys, and of values, and whether the mask has a window and segments besides."""
WIDTHS = {"forward": (1, 1), "backward": (3, 2)}
"""Products of a tile's size in each kernel, over the head dim of keys and over that of values."""

GROUPED = {"experts": 64, "rows": 24576, "width": 2048, "mlp": 1408}
"""DeepSeek-V2-Lite: 4096 tokens, six experts each."""


def flash_case(dims: tuple[int, int], masked: bool, tile: tuple[int, int]) -> Case:
    """Return attention forward and backward, causal with grouped heads, and its arguments' shapes."""

    def run(q, k, v, do, segments, window):
        masks = {"segment_ids": segments, "window": window} if masked else {}
        attend = functools.partial(flash_attention, impl="tpu", block_sizes=tile, **masks)
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    shapes = [(HEADS, dims[0]), (KV_HEADS, dims[0]), (KV_HEADS, dims[1]), (HEADS, dims[1])]
    arrays = [jax.ShapeDtypeStruct((1, LENGTH, *shape), jnp.bfloat16) for shape in shapes]
    return run, [*arrays, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)]


def products_case(dims: tuple[int, int], tile: tuple[int, int]) -> Case:
    """Return the two products of a tile of the forward pass alone, as a kernel: the plain matmul of its shapes."""

    def kernel(q, k, v, o):
        scores = jax.lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        o[...] += jnp.dot(scores.astype(v.dtype), v[...], preferred_element_type=jnp.float32)

    def run(q, k, v):
        return pl.pallas_call(
            kernel,
            grid=(LENGTH // tile[1],),
            in_specs=[
                pl.BlockSpec((tile[0], dims[0]), lambda step: (0, 0)),
                pl.BlockSpec((tile[1], dims[0]), lambda step: (step, 0)),
                pl.BlockSpec((tile[1], dims[1]), lambda step: (step, 0)),
            ],
            out_specs=pl.BlockSpec((tile[0], dims[1]), lambda step: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((tile[0], dims[1]), jnp.float32),
            name="products",
        )(q, k, v)

    shapes = [(tile[0], dims[0]), (LENGTH, dims[0]), (LENGTH, dims[1])]
    return run, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def matmul_case(size: int = 4096) -> Case:
    """Return a plain matmul, left to XLA."""
    return jnp.matmul, [jax.ShapeDtypeStruct((size, size), jnp.bfloat16)] * 2


def grouped_case(name: str) -> Case:
    """Return a grouped matmul and its gradients by a name of GROUPED_MATMULS."""

    def run(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: GROUPED_MATMULS[name](x, w, sizes), x, w)
        return y, pull(dy)

    experts, rows, width, mlp = GROUPED.values()
    shapes = [(rows, width), (experts, width, mlp), (experts,), (rows, mlp)]
    dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16]
    return run, list(map(jax.ShapeDtypeStruct, shapes, dtypes))


GROUPED_MATMULS = {
    "jaxllm": functools.partial(grouped_matmul, impl="tpu"),
    "lax.ragged_dot": jax.lax.ragged_dot,
    "megablox": functools.partial(megablox.gmm, preferred_element_type=jnp.bfloat16, tiling=(512, 512, 1408)),
}
