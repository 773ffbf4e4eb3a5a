"""Feed-forward layers."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxllm.nn.linear import project
from jaxllm.nn.param import param
from jaxllm.sharding.rules import constrain
from jaxllm.spec import MLP

ACTIVATIONS = {"silu": jax.nn.silu}


class FeedForward(nn.Module):
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)) (arXiv:2002.05202 eq. 5)."""

    spec: MLP

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, inner, bias = x.shape[-1], self.spec.intermediate_size, self.spec.bias
        gate = Matrix((width, inner), ("embed", "mlp"), "matrix", bias, name="gate")(x)
        up = Matrix((width, inner), ("embed", "mlp"), "matrix", bias, name="up")(x)
        hidden = constrain(ACTIVATIONS[self.spec.activation](gate) * up, "batch", "length", "act_mlp")
        return Matrix((inner, width), ("mlp", "embed"), "output", bias, name="down")(hidden)


class Matrix(nn.Module):
    """A matrix product over the last axis, with an optional bias."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    kind: str
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, outputs = self.shape
        y = project(x, param(self, "kernel", self.shape, self.axes, self.kind, inputs))
        if self.bias:
            axis = "mlp" if self.axes[1] == "mlp" else "norm"
            y += param(self, "bias", (outputs,), (axis,), "zeros").astype(x.dtype)[None, None]
        return y
