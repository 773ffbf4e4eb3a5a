"""Mixture-of-experts feed-forward layers as DeepSeek-V2's: routing, its statistics, dropping and the experts."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxllm.nn.adapter import LowRank, adapter_of, factor_axes
from jaxllm.nn.mlp import ACTIVATIONS, FeedForward
from jaxllm.nn.param import Kind, param
from jaxllm.nn.quantized import Weight, multiply
from jaxllm.sharding.rules import RULES, constrain
from jaxllm.sharding.staged import on_each_device, sum_over
from jaxllm.spec import MLP, MoE
from kernels_pallas.grouped_matmul import grouped_matmul

_INNER_AXES, _OUTER_AXES = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")


Adapters = tuple[LowRank | None, LowRank | None, LowRank | None]
"""What an adapter has beside the experts' gate, up and down matrices."""


class RoutingStatistics(flax.struct.PyTreeNode):
    """What the balance losses see of one layer's routing, before any dropping; padding counts nothing.

    Attributes:
      load: float [B, E], how many of the row's tokens selected each expert.
      mean_probs: float [B, E], mean affinity of the row's tokens to each expert; 0 in a row without tokens.
      sent: float [B, groups], how many of the row's tokens selected an expert of each group.
      num_tokens: float [B].
    """

    load: jax.Array
    mean_probs: jax.Array
    sent: jax.Array
    num_tokens: jax.Array


class Routing(flax.struct.PyTreeNode):
    """Where the tokens of one layer went.

    Attributes:
      expert_ids: int32 [B, T, k], ascending.
      weights: float [B, T, k], as applied: 0 where the selection was dropped.
    """

    expert_ids: jax.Array
    weights: jax.Array
    statistics: RoutingStatistics


def route(logits: jax.Array, spec: MoE) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Select experts by router logits [..., E] (arXiv:2405.04434 eq. 20-22 and section 2.2.2).

    Returns:
      weights [..., k] and ascending expert ids int32 [..., k] of the selections, and the affinities of all experts
      [..., E]; computed in promote_types(logits, float32).
    """
    probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    scores = _within_best_groups(probs, spec) if spec.topk_groups < spec.num_groups else probs
    expert_ids = jnp.sort(jax.lax.top_k(scores, spec.num_experts_per_tok)[1], axis=-1)
    weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if spec.norm_topk_prob and spec.num_experts_per_tok > 1:
        # As published (modeling_deepseek.py, MoEGate): the scaling factor belongs to the other case alone.
        return weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20), expert_ids, probs
    return weights * spec.scaling_factor, expert_ids, probs


def _within_best_groups(probs: jax.Array, spec: MoE) -> jax.Array:
    """Return `probs` with 0 outside the groups of the largest affinities; 0 and not -inf, as published."""
    groups = probs.reshape(*probs.shape[:-1], spec.num_groups, -1)
    best = jax.lax.top_k(jnp.max(groups, axis=-1), spec.topk_groups)[1]
    is_best = jnp.any(jax.nn.one_hot(best, spec.num_groups, dtype=bool), axis=-2)
    return jnp.where(is_best[..., None], groups, 0).reshape(probs.shape)


def routing_statistics(probs: jax.Array, expert_ids: jax.Array, valid: jax.Array, spec: MoE) -> RoutingStatistics:
    """Count what the tokens with `valid` bool [B, T] selected; `probs` [B, T, E] and `expert_ids` [B, T, k] of `route`.

    Only `mean_probs` is differentiable.
    """
    selected = jnp.any(jax.nn.one_hot(expert_ids, spec.num_experts, dtype=bool), axis=-2) & valid[..., None]
    sent = jnp.any(selected.reshape(*valid.shape, spec.num_groups, -1), axis=-1)
    num_tokens = jnp.sum(valid, axis=1, dtype=probs.dtype)
    total = jnp.sum(jnp.where(valid[..., None], probs, 0), axis=1)
    return RoutingStatistics(
        load=jnp.sum(selected, axis=1, dtype=probs.dtype),
        mean_probs=total / jnp.maximum(num_tokens, 1)[:, None],
        sent=jnp.sum(sent, axis=1, dtype=probs.dtype),
        num_tokens=num_tokens,
    )


def kept_selections(
    probs: jax.Array, expert_ids: jax.Array, valid: jax.Array, spec: MoE, never_dropped: jax.Array | None = None
) -> jax.Array:
    """Tell which selections stay when each group has a budget, bool [B, T, k] (arXiv:2405.04434 section 2.2.4).

    A group's budget is capacity_factor times its mean load over the valid tokens of the batch; beyond it the
    selections of least affinity go. All that tie at the edge stay.

    Args:
      probs: [B, T, E] and expert_ids [B, T, k] of `route`. valid: bool [B, T].
      never_dropped: bool [B], rows whose selections fill the budget first and stay even beyond it.
    """
    affinity = jnp.take_along_axis(probs, expert_ids, axis=-1).astype(jnp.float32)
    # The bits of floats in [0, 1] order as the floats do, and all lie below 2^30.
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(affinity), jnp.int32)
    if never_dropped is not None:
        bits = jnp.where(never_dropped[:, None, None], 2**30 - 1, bits)
    in_group = jax.nn.one_hot(expert_ids // (spec.num_experts // spec.num_groups), spec.num_groups, dtype=bool)
    counted = jnp.where(in_group & valid[..., None, None], bits[..., None], -1)
    budget = spec.capacity_factor * spec.num_experts_per_tok / spec.num_groups * sum_over(jnp.sum(valid), "batch")

    def settle_bit(step: jax.Array, edge: jax.Array) -> jax.Array:
        higher = edge | (1 << (29 - step))
        count = sum_over(jnp.sum(counted >= higher[None, None, None], axis=(0, 1, 2)), "batch")
        return jnp.where(count >= jnp.floor(budget), higher, edge)

    # The n-th largest of each group, bit by bit: unlike a sort, counts cross the mesh as one number per group.
    edge = jax.lax.fori_loop(0, 30, settle_bit, jnp.zeros(spec.num_groups, jnp.int32))
    return jnp.any(in_group & (bits[..., None] >= edge[None, None, None]), axis=-1)


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


class MixtureOfExperts(nn.Module):
    """Routed experts, plus shared ones that every token passes (arXiv:2405.04434 eq. 20).

    Attributes:
      activation: a key of `mlp.ACTIVATIONS`.
    """

    spec: MoE
    activation: str = "silu"

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array, *, train: bool, never_dropped: jax.Array | None = None
    ) -> tuple[jax.Array, Routing]:
        """Return (y [B, T, D], where its tokens went).

        Args:
          x: [B, T, D]. valid: bool [B, T]; other tokens are routed too, but count nowhere.
          train: selections beyond the capacity are dropped, where the spec has one.
          never_dropped: bool [B], rows that keep all selections; None: none.
        """
        spec = self.spec
        wide = jnp.promote_types(x.dtype, jnp.float32)
        shape, axes = (x.shape[-1], spec.num_experts), ("expert_embed", "experts")
        kernel, _ = Kernel(shape, axes, "matrix", name="router")(wide)
        logits = jnp.matmul(x.astype(wide), kernel, precision=jax.lax.Precision.HIGHEST)
        weights, expert_ids, probs = route(constrain(logits, "batch", "length", None), spec)
        if train and spec.capacity_factor is not None:
            weights = jnp.where(kept_selections(probs, expert_ids, valid, spec, never_dropped), weights, 0)
        y = Experts(spec, self.activation, name="experts")(x, expert_ids, weights)
        if spec.num_shared_experts:
            width = spec.moe_intermediate_size * spec.num_shared_experts
            y += FeedForward(MLP(intermediate_size=width, activation=self.activation), name="shared")(x)
        statistics = routing_statistics(probs, expert_ids, valid, spec)
        routing = Routing(expert_ids=expert_ids, weights=weights, statistics=statistics)
        return constrain(y, "batch", "length", "act_embed"), routing
