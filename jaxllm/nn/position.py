"""Rotary positions and their length-dependent variants, ALiBi and LogN. Angles are float32 throughout."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.spec import ChunkedNTK, DynamicNTK, LinearScaling, LogN, Rope, Rope2D, Yarn


def inverse_frequencies(head_dim: int, theta: float | jax.Array) -> jax.Array:
    """Return theta^(-2i/head_dim) for i = 0 .. head_dim/2 - 1 (arXiv:2104.09864 eq. 15).

    Args:
      theta: base, float or float32 [...]; the result is float32 [..., head_dim/2].
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    theta = jnp.asarray(theta, jnp.float32)[..., None]
    return 1.0 / theta ** jnp.asarray(exponents).reshape((1,) * (theta.ndim - 1) + (-1,))


def dynamic_ntk_theta(
    theta: float, length: jax.Array | int, *, factor: float, original_max_position: int, head_dim: int
) -> jax.Array:
    """Return the enlarged base of transformers' "dynamic" scaling for a call of `length` tokens (float32)."""
    length = jnp.maximum(jnp.asarray(length, jnp.float32), original_max_position)
    growth = factor * length / original_max_position - (factor - 1)
    return theta * growth ** (head_dim / (head_dim - 2))


def chunked_ntk_alpha(length: jax.Array | int, train_length: int) -> jax.Array:
    """Return Qwen's NTK alpha, max(2^ceil(log2(length / train_length) + 1) - 1, 1), as float32.

    Computed in integers: float log2 rounds the wrong way at exact multiples on some devices.
    """
    length = jnp.asarray(length, jnp.int32)
    alpha = jnp.ones(length.shape, jnp.int32)
    for power in range(31 - int(train_length).bit_length()):
        alpha = jnp.where(length > train_length << power, (4 << power) - 1, alpha)
    return alpha.astype(jnp.float32)


def chunked_ntk_theta(theta: float, length: jax.Array | int, *, train_length: int, head_dim: int) -> jax.Array:
    """Return Qwen's base for rows of `length` valid tokens: theta * alpha^(d/(d-2)) (float32)."""
    return theta * chunked_ntk_alpha(length, train_length) ** (head_dim / (head_dim - 2))


def yarn_inverse_frequencies(yarn: Yarn, theta: float, dim: int) -> np.ndarray:
    """Return YaRN's frequencies, float32 [dim/2] (arXiv:2309.00071 eq. 18-23, bounds as DeepSeek-V2 rounds them)."""

    def dimension_of(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return (frequencies * (1 - ramp) + frequencies / yarn.factor * ramp).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return g(mscale) = 0.1 mscale ln(factor) + 1, or 1 where nothing is stretched (arXiv:2309.00071 eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class RopeTables(flax.struct.PyTreeNode):
    """Rotations of the first dimensions of each head.

    Attributes:
      cos, sin: float32 [B, T, C, R/2]: the R C rotated dimensions lie in C sections with positions of their own.
      layout: which dimensions of a section are pairs, see spec.Rope.
    """

    cos: jax.Array
    sin: jax.Array
    layout: str = flax.struct.field(pytree_node=False)


def rope_tables(
    rope: Rope | Rope2D,
    positions: jax.Array,
    rotary_dim: int,
    *,
    length: jax.Array,
    train: bool,
    block_positions: jax.Array | None = None,
) -> RopeTables:
    """Return the rotation of every token.

    Args:
      positions: int [B, T].
      rotary_dim: rotated dimensions of a head.
      length: int [B], the length that length-dependent scalings see.
      train: Qwen's scaling is off in training.
      block_positions: int [B, T], for Rope2D.
    """
    if isinstance(rope, Rope2D):
        frequencies = _rounded(inverse_frequencies(rotary_dim // 2, rope.theta), rope.inv_freq_dtype)
        sections = jnp.stack([positions, block_positions], axis=-1).astype(jnp.float32)
        angles = sections[..., None] * frequencies[None, None, None]
        return RopeTables(cos=jnp.cos(angles), sin=jnp.sin(angles), layout="half")
    positions = positions.astype(jnp.float32)
    if isinstance(rope.scaling, LinearScaling):
        positions = positions / rope.scaling.factor
    frequencies = _rounded(_frequencies(rope, rotary_dim, length, train), rope.inv_freq_dtype)
    frequencies = jnp.broadcast_to(frequencies, (positions.shape[0], rotary_dim // 2))
    angles = (positions[..., None] * frequencies[:, None])[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(rope.scaling, Yarn):
        yarn = rope.scaling
        ratio = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        cos, sin = cos * ratio, sin * ratio
    return RopeTables(cos=cos, sin=sin, layout=rope.layout)


def _frequencies(rope: Rope, dim: int, length: jax.Array, train: bool) -> jax.Array:
    """Return float32 [dim/2], or [B, dim/2] where the base depends on the length."""
    scaling = rope.scaling
    if isinstance(scaling, Yarn):
        return jnp.asarray(yarn_inverse_frequencies(scaling, rope.theta, dim))
    theta = rope.theta
    if isinstance(scaling, DynamicNTK):
        original = scaling.original_max_position
        theta = dynamic_ntk_theta(theta, length, factor=scaling.factor, original_max_position=original, head_dim=dim)
    elif isinstance(scaling, ChunkedNTK) and not train:
        theta = chunked_ntk_theta(theta, length, train_length=scaling.train_length, head_dim=dim)
    return inverse_frequencies(dim, theta)


def _rounded(frequencies: jax.Array, dtype: str) -> jax.Array:
    return frequencies.astype(dtype).astype(jnp.float32)


def apply_rope(x: jax.Array, tables: RopeTables) -> jax.Array:
    """Rotate the first dimensions of each head; x [B, T, N, H].

    The rotation is float32; the result has x's dtype.
    """
    sections, pairs = tables.cos.shape[2:]
    rotary_dim = 2 * sections * pairs
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    shape = (*x.shape[:-1], sections, *((2, pairs) if tables.layout == "half" else (pairs, 2)))
    axis = -2 if tables.layout == "half" else -1
    wide = rotated.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(shape)
    first, second = (jnp.squeeze(part, axis) for part in jnp.split(wide, 2, axis=axis))
    cos, sin = tables.cos[:, :, None], tables.sin[:, :, None]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    turned = turned.reshape(rotated.shape).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Return each head's slope, float32 [num_heads] (arXiv:2108.12409 section 3).

    Where the number of heads is no power of two, the slopes of the next smaller power come first, then every second
    slope of the next larger one.
    """
    power = 1 << (num_heads.bit_length() - 1)

    def slopes(heads: int) -> np.ndarray:
        return 2.0 ** (-8.0 / heads * np.arange(1, heads + 1))

    return np.concatenate([slopes(power), slopes(2 * power)[::2][: num_heads - power]]).astype(np.float32)


def logn_scale(logn: LogN, positions: jax.Array) -> jax.Array:
    """Return max(1, log(p + 1) / log(train_length)) for 0-based positions p, float32 (arXiv:2309.16609 section 3.1)."""
    return jnp.maximum(jnp.log(positions.astype(jnp.float32) + 1.0) / np.log(logn.train_length), 1.0)
