"""Rotary positions, their length-dependent variants and LogN query scaling. Angles are float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.spec import ChunkedNTK, DynamicNTK, LinearScaling, LogN, Rope


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


def rope_tables(
    rope: Rope, positions: jax.Array, head_dim: int, *, length: jax.Array, train: bool
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of every rotation angle, float32 [B, T, head_dim/2].

    Args:
      positions: int [B, T].
      length: int [B], the length that length-dependent scalings see.
      train: Qwen's scaling is off in training.
    """
    scaling, theta = rope.scaling, rope.theta
    positions = positions.astype(jnp.float32)
    if isinstance(scaling, LinearScaling):
        positions = positions / scaling.factor
    elif isinstance(scaling, DynamicNTK):
        theta = dynamic_ntk_theta(
            theta,
            length,
            factor=scaling.factor,
            original_max_position=scaling.original_max_position,
            head_dim=head_dim,
        )
    elif isinstance(scaling, ChunkedNTK) and not train:
        theta = chunked_ntk_theta(theta, length, train_length=scaling.train_length, head_dim=head_dim)
    frequencies = inverse_frequencies(head_dim, theta)
    angles = positions[..., None] * jnp.broadcast_to(frequencies, (positions.shape[0], head_dim // 2))[:, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the two halves of each head against each other; x [B, T, N, H], cos and sin [B, T, H/2].

    The rotation is float32; the result has x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def logn_scale(logn: LogN, positions: jax.Array) -> jax.Array:
    """Return max(1, log(p + 1) / log(train_length)) for 0-based positions p, float32 (arXiv:2309.16609 section 3.1)."""
    return jnp.maximum(jnp.log(positions.astype(jnp.float32) + 1.0) / np.log(logn.train_length), 1.0)
