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
        width, inner = x.shape[-1], self.spec.intermediate_size
        gate = Matrix((width, inner), ("embed", "mlp"), "matrix", name="gate")(x)
        up = Matrix((width, inner), ("embed", "mlp"), "matrix", name="up")(x)
        hidden = constrain(ACTIVATIONS[self.spec.activation](gate) * up, "batch", "length", "act_mlp")
        return Matrix((inner, width), ("mlp", "embed"), "output", name="down")(hidden)


class Matrix(nn.Module):
    """A plain matrix product over the last axis."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, param(self, "kernel", self.shape, self.axes, self.kind, self.shape[0]))
