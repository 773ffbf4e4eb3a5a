"""Mixture-of-experts feed-forward layers as DeepSeek-V2's: routing, its statistics and dropping."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxllm.nn.experts import Experts, Kernel
from jaxllm.nn.mlp import FeedForward
from jaxllm.sharding.rules import constrain
from jaxllm.sharding.staged import sum_over
from jaxllm.spec import MLP, MoE


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
