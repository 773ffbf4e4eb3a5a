"""Normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.param import param


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis by its root mean square (arXiv:1910.07467 eq. 4).

    Statistics and division are float32, the result is cast to x's dtype before the scale, as Qwen and LLaMA do.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse_rms).astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale over the hidden dimension."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", (x.shape[-1],), ("norm",), "ones")
        return rms_norm(x, scale, self.eps)
