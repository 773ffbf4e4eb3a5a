"""Feed-forward layers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from jaxllm.nn.adapter import linear
from jaxllm.nn.param import param
from jaxllm.sharding.rules import constrain
from jaxllm.spec import MLP

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class FeedForward(nn.Module):
    """Feed-forward layer, gated (arXiv:2002.05202 eq. 5) or plain: down(activation(up(x)))."""

    spec: MLP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, inner, bias = x.shape[-1], self.spec.intermediate_size, self.spec.bias
        activation = ACTIVATIONS[self.spec.activation]
        hidden = Matrix((width, inner), ("embed", "mlp"), "matrix", bias, name="up")(x)
        if self.spec.gated:
            hidden = activation(Matrix((width, inner), ("embed", "mlp"), "matrix", bias, name="gate")(x)) * hidden
        else:
            hidden = activation(hidden)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return Matrix((inner, width), ("mlp", "embed"), "output", bias, name="down")(hidden)


class Matrix(nn.Module):
    """A matrix product over the last axis, with an optional bias."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    kind: str
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(self, x, self.shape, self.axes, self.kind)
        if self.bias:
            axis = "mlp" if self.axes[1] == "mlp" else "norm"
            y += param(self, "bias", self.shape[1:], (axis,), "zeros").astype(x.dtype)[None, None]
        return y
