"""Frozen matrices held in 8 or 4 bits, and widened where they are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.nn.linear import project
from jaxllm.sharding.staged import gather

Format = Literal["int8", "nf4"]

BLOCK = 64
"""Values that share a scale (arXiv:2305.14314 section 3)."""

NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The 16 levels of NormalFloat-4 (arXiv:2305.14314 appendix E)."""


class Quantized(flax.struct.PyTreeNode):
    """A matrix as whole numbers and scales. A stack of matrices has the layers, and experts, in front of both.

    Attributes:
      codes: int8, int8 in the matrix's shape; nf4: uint8, two neighbours of the last input dimension in one, the first
        in the low bits.
      scales: float32, of each output (int8: size 1 in place of the inputs), or of each block of inputs (nf4).
      inputs: dimensions of the inputs, counted from the end.
    """

    codes: jax.Array
    scales: jax.Array
    kind: Format = flax.struct.field(pytree_node=False)
    inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def axes_of_scales(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the logical axes of the scales of a matrix with these axes.

        They are whole along the inputs that share them: blocks are too few to be split as the inputs are.
        """
        shared = {len(axes) + dim for dim in (self.inputs if self.kind == "int8" else self.inputs[-1:])}
        return tuple("norm" if dim in shared else axis for dim, axis in enumerate(axes))

    def gathered(self, axes: tuple[str, ...], keep: tuple[str, ...] = ()) -> Quantized:
        """Return the whole of it, where weights are gathered by hand; arguments as in `gather`."""
        codes = gather(self.codes, axes, keep=keep)
        scales = gather(self.scales, self.axes_of_scales(axes), keep=keep)
        return self.replace(codes=codes, scales=scales)

    def widened(self, dtype: jnp.dtype) -> jax.Array:
        """Return the matrix."""
        if self.kind == "int8":
            return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)
        dim = self.codes.ndim + self.inputs[-1]
        before, after = self.codes.shape[:dim], self.codes.shape[dim + 1 :]
        return jnp.stack(self.halves(dtype), axis=dim + 1).reshape(*before, -1, *after)

    def halves(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return what an nf4 matrix has for the even, and for the odd places of the last input dimension."""
        dim, codes = self.codes.ndim + self.inputs[-1], self.codes
        blocks = (*codes.shape[:dim], self.scales.shape[dim], -1, *codes.shape[dim + 1 :])
        scales = jnp.expand_dims(self.scales, dim + 1)
        low, high = (
            (_levels(part).reshape(blocks) * scales).astype(dtype).reshape(codes.shape) for part in (codes, codes >> 4)
        )
        return low, high


Weight = jax.Array | Quantized


def quantize(kernel: jax.Array, inputs: tuple[int, ...], kind: Format) -> Quantized:
    """Quantise a matrix, or a stack of them, float [..., in..., out...].

    int8: each output channel has the scale max|w| / 127. nf4: blocks of 64 inputs (or as many of them as divide the
    dimension) have the scale max|w|, and each value becomes the nearest of NF4_LEVELS.

    Args:
      inputs: the dimensions of the inputs, counted from the end.

    Raises:
      InputError: nf4, and the last dimension of the inputs is odd.
    """
    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        scales = _positive(jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True)) / 127
        return Quantized(jnp.round(kernel / scales).astype(jnp.int8), scales, kind, inputs)
    dim = kernel.ndim + inputs[-1]
    before, size, after = kernel.shape[:dim], kernel.shape[dim], kernel.shape[dim + 1 :]
    blocks = kernel.reshape(*before, -1, block_size(size), *after)
    scales = _positive(jnp.max(jnp.abs(blocks), axis=dim + 1, keepdims=True))
    middles = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    codes = jnp.searchsorted(middles, blocks / scales, method="compare_all").astype(jnp.uint8)
    pairs = codes.reshape(*before, size // 2, 2, *after)
    first, second = (jax.lax.index_in_dim(pairs, i, dim + 1, keepdims=False) for i in (0, 1))
    return Quantized(first | (second << 4), jnp.squeeze(scales, dim + 1), kind, inputs)


def block_size(size: int) -> int:
    """Return how many values of a dimension share a scale in nf4; InputError where it is odd."""
    if size % 2:
        raise InputError(
            f"adapter.base: nf4 packs pairs of inputs, found a matrix with {size}; expected an even number"
        )
    return math.gcd(size, BLOCK)


def _levels(codes: jax.Array) -> jax.Array:
    """Return the levels of the low four bits, float32: by selection, as a TPU looks single numbers up one by one."""
    levels = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in (1, 2, 4, 8):
        is_set = (codes & bit) != 0
        levels = [jnp.where(is_set, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def _positive(scales: jax.Array) -> jax.Array:
    """Return scales with 1 in place of 0, that of zeros."""
    return jnp.where(scales == 0, 1, scales)


def multiply(function: Callable[..., Any], weights: Any, *arrays: jax.Array) -> Any:
    """Return function(weights, *arrays), with quantised weights widened to the arrays' dtype.

    They are widened again for the backward pass: kept, they would be the whole model in that dtype.

    Args:
      weights: one, or a tuple of them.
    """
    if not any(isinstance(each, Quantized) for each in jax.tree.leaves(weights, is_leaf=_is_quantized)):
        return function(weights, *arrays)

    def widen_and_run(weights: Any, *arrays: jax.Array) -> Any:
        return function(widened(weights, arrays[0].dtype), *arrays)

    return jax.checkpoint(widen_and_run, prevent_cse=False)(weights, *arrays)


def project_held(x: jax.Array, kernel: Weight, num_inputs: int = 1) -> jax.Array:
    """Return `linear.project` of x with a matrix that may be held in codes.

    Of nf4 the two halves are multiplied one after the other: interleaved they would cross the memory once more, which
    on a TPU costs more than the product.
    """
    if not (isinstance(kernel, Quantized) and kernel.kind == "nf4"):
        return multiply(lambda kernel, x: project(x, kernel, num_inputs), kernel, x)

    def widen_and_project(kernel: Quantized, x: jax.Array) -> jax.Array:
        wide, pairs = jnp.promote_types(x.dtype, jnp.float32), x.reshape(*x.shape[:-1], -1, 2)
        products = (
            project(pairs[..., place], half, num_inputs, result_dtype=wide)
            for place, half in enumerate(kernel.halves(x.dtype))
        )
        return sum(products).astype(x.dtype)

    return jax.checkpoint(widen_and_project, prevent_cse=False)(kernel, x)


def widened(tree: Any, dtype: jnp.dtype) -> Any:
    """Return a tree with its quantised matrices widened to `dtype`."""
    return jax.tree.map(lambda leaf: leaf.widened(dtype) if _is_quantized(leaf) else leaf, tree, is_leaf=_is_quantized)


def _is_quantized(value: Any) -> bool:
    return isinstance(value, Quantized)
