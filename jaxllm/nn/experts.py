"""The experts of a mixture: gated feed-forward layers of which each token passes a few."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.adapter import LowRank, adapter_of, factor_axes
from jaxllm.nn.mlp import ACTIVATIONS
from jaxllm.nn.param import Kind, param
from jaxllm.nn.quantized import Weight, multiply
from jaxllm.sharding.rules import RULES
from jaxllm.sharding.staged import on_each_device
from jaxllm.spec import MoE
from kernels_pallas.grouped_matmul import grouped_matmul

_INNER_AXES, _OUTER_AXES = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")

Adapters = tuple[LowRank | None, LowRank | None, LowRank | None]
"""What an adapter has beside the experts' gate, up and down matrices."""


@jax.custom_vjp
def _gather(rows: jax.Array, source: jax.Array, copies: jax.Array) -> jax.Array:
    """Return rows[source]; `copies` [N, c] says where in the result each row went.

    With it the gradient is a gather and a float32 sum too, where automatic differentiation would add rows one by one in
    their own dtype.
    """
    return rows[source]


_gather.defvjp(
    lambda rows, source, copies: (rows[source], copies),
    lambda copies, gradient: (jnp.sum(gradient[copies], axis=1), None, None),
)


def mix_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    *,
    activation: str,
    first_expert: jax.Array | int = 0,
    num_experts: int | None = None,
    adapters: Adapters = (None, None, None),
) -> jax.Array:
    """Return the weighted sum of the selected experts' outputs [M, D]; it is float32 while it is summed.

    Args:
      x: [M, D]. expert_ids: int32 [M, k]. weights: float32 [M, k].
      kernels: gate [E, D, F], up [E, D, F] and down [E, F, D] of the experts from `first_expert` on; selections of
        others add nothing.
      num_experts: of all devices, None: E; says how many selections to expect here.
      adapters: what is added to each of the kernels.
    """
    gate, up, down = (kernel.astype(x.dtype) for kernel in kernels)
    tokens, per_token = expert_ids.shape
    experts = expert_ids.reshape(-1) - first_expert
    experts = jnp.where((experts >= 0) & (experts < gate.shape[0]), experts, gate.shape[0])
    order = jnp.argsort(experts)
    place = jnp.argsort(order)
    group_sizes = jnp.sum(jax.nn.one_hot(experts, gate.shape[0], dtype=jnp.int32), axis=0)

    expected_rows = tokens * per_token * gate.shape[0] // (num_experts or gate.shape[0])
    grouped = functools.partial(grouped_matmul, group_sizes=group_sizes, expected_rows=expected_rows)

    def multiply(rows: jax.Array, kernel: jax.Array, low_rank: LowRank | None) -> jax.Array:
        y = grouped(rows, kernel)
        return y if low_rank is None else y + grouped(grouped(rows, low_rank.a) * low_rank.scale, low_rank.b)

    for_gate, for_up, for_down = adapters
    rows = _gather(x, order // per_token, place.reshape(tokens, per_token))
    hidden = ACTIVATIONS[activation](multiply(rows, gate, for_gate)) * multiply(rows, up, for_up)
    outputs = _gather(multiply(hidden, down, for_down), place, order[:, None])
    outputs = outputs.reshape(tokens, per_token, -1)
    return jnp.sum(outputs * weights[..., None], axis=1).astype(x.dtype)


def _mix_on_mesh(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    activation: str,
    adapters: Adapters,
) -> jax.Array:
    """Run `mix_experts` on [B, T, ...] so that each device sorts few tokens and holds few experts.

    Devices that split the experts among them exchange their tokens, apply the experts that they have, and give the
    sums back: without limits on an expert's load, where a token goes is only known when it goes. Left to the
    partitioner, the sort would gather all tokens of the batch on every device.
    """
    inner, outer = ("experts", None, "mlp"), ("experts", "mlp", None)
    num_experts = kernels[0].shape[0]
    factors, structure = jax.tree.flatten(adapters)
    factor_axes_of = [
        factor_axes(axes, 1)
        for axes, low_rank in zip((inner, inner, outer), adapters, strict=True)
        if low_rank is not None
    ]

    def mix(x, expert_ids, weights, gate, up, down, *factors):
        first = jax.lax.axis_index(RULES.experts) * gate.shape[0]
        flat = (
            jax.lax.all_gather(array.reshape(-1, array.shape[-1]), RULES.experts, tiled=True)
            for array in (x, expert_ids, weights)
        )
        y = mix_experts(
            *flat,
            (gate, up, down),
            activation=activation,
            first_expert=first,
            num_experts=num_experts,
            adapters=jax.tree.unflatten(structure, factors),
        )
        y = jax.lax.psum_scatter(y, RULES.experts, tiled=True)
        return jax.lax.psum(y, RULES.mlp).reshape(x.shape)

    tokens = ("batch", "length", None)
    in_axes = (tokens, tokens, tokens, inner, inner, outer, *itertools.chain(*factor_axes_of))
    return on_each_device(mix, in_axes, tokens)(x, expert_ids, weights, *kernels, *factors)


class Kernel(nn.Module):
    """A matrix, or a stack of one per expert, that is declared here and multiplied elsewhere."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: Kind

    @nn.compact
    def __call__(self, dtype: jnp.dtype, keep: tuple[str, ...] = ()) -> tuple[Weight, LowRank | None]:
        """Return it in `dtype` (or as the codes it is held as), and what an adapter has beside it."""
        kernel = param(self, "kernel", self.shape, self.axes, self.kind, self.shape[-2], dtype=dtype, keep=keep)
        low_rank = adapter_of(self, "kernel")
        return kernel, None if low_rank is None else low_rank.gathered(self.axes, 1, dtype, keep)


class Experts(nn.Module):
    """Gated feed-forward layers of which each token passes a few."""

    spec: MoE
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, expert_ids: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the weighted outputs [B, T, D] for x [B, T, D], expert_ids [B, T, k] and weights [B, T, k]."""
        experts, width, inner = self.spec.num_experts, x.shape[-1], self.spec.moe_intermediate_size
        kept = {"dtype": x.dtype, "keep": ("experts",)}
        gate = Kernel((experts, width, inner), _INNER_AXES, "matrix", name="gate")(**kept)
        up = Kernel((experts, width, inner), _INNER_AXES, "matrix", name="up")(**kept)
        down = Kernel((experts, inner, width), _OUTER_AXES, "output", name="down")(**kept)
        kernels, adapters = zip(gate, up, down, strict=True)

        def mix(kernels: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
            if not jax.sharding.get_abstract_mesh().empty and not self.is_initializing():
                return _mix_on_mesh(x, expert_ids, weights, kernels, self.activation, adapters)
            flat = (array.reshape(-1, array.shape[-1]) for array in (x, expert_ids, weights))
            return mix_experts(*flat, kernels, activation=self.activation, adapters=adapters).reshape(x.shape)

        return multiply(mix, kernels, x)
