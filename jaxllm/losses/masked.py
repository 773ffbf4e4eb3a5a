"""Sums and means over the trained positions of rows, for the losses of the later stages."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sequence_logps(logps: jax.Array, mask: jax.Array, *, mean: bool = False) -> jax.Array:
    """Return the log-probability of each row's trained tokens, or its mean over them, in nats, [B].

    Args:
      logps, mask: [B, T]; mask 0 = not counted. Rows without a trained token give 0.
    """
    totals = jnp.sum(masked(logps, mask), axis=-1)
    return totals / counts(mask, totals.dtype) if mean else totals


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of all values, of any shape, where the mask is not 0."""
    values = masked(values, mask)
    return jnp.sum(values) / jnp.maximum(jnp.sum(mask != 0), 1).astype(values.dtype)


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the values in promote_types(input, float32), with 0 where the mask is 0, whatever stood there."""
    return jnp.where(mask != 0, wide(values), 0)


def counts(mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return each row's number of trained positions, at least 1, [B]."""
    return jnp.maximum(jnp.sum(mask != 0, axis=-1), 1).astype(dtype)


def wide(x: jax.Array) -> jax.Array:
    """Return x in promote_types(x, float32); integers become the widest float that is enabled, as in numpy."""
    x = jnp.asarray(x)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if is_float else jnp.result_type(float))
