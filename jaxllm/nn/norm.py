"""Normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.param import param
from jaxllm.spec import Norm


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis by its root mean square (arXiv:1910.07467 eq. 4).

    Statistics and division are float32, the result is cast to x's dtype before the scale, as Qwen and LLaMA do.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse_rms).astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis to mean zero and variance one (arXiv:1607.06450), all in float32; x's dtype again."""
    wide_type = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(wide_type)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scale, bias = (jnp.expand_dims(value.astype(wide_type), range(x.ndim - 1)) for value in (scale, bias))
    return (normed * scale + bias).astype(x.dtype)


class Normalize(nn.Module):
    """The norm of a spec, with its learned scale (and bias) over the last axis."""

    spec: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", (x.shape[-1],), ("norm",), "ones")
        if self.spec.kind == "rms":
            return rms_norm(x, scale, self.spec.eps)
        return layer_norm(x, scale, param(self, "bias", (x.shape[-1],), ("norm",), "zeros"), self.spec.eps)
