"""Losses of reward models, one value per pair: unreduced, computed in promote_types(input, float32)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxllm.losses.masked import wide

# Margins by the label of a pair, arXiv:2307.09288 table 27.
LLAMA2_MARGINS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "small": MappingProxyType({"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligible": 0.0}),
        "large": MappingProxyType({"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligible": 0.0}),
    }
)

# Beyond this share of its bound the log barrier goes on as a line.
_BARRIER_SHARE = 0.9999


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | None = None) -> jax.Array:
    """Return -log sigmoid(chosen - rejected - margin), [B] (arXiv:2203.02155 eq. 1, arXiv:2307.09288 eq. 2).

    Args:
      chosen, rejected: scores, [B]. margin: [B]; None: 0.
    """
    difference = wide(chosen) - wide(rejected)
    return -jax.nn.log_sigmoid(difference if margin is None else difference - wide(margin))


def focal_ranking_loss(chosen: jax.Array, rejected: jax.Array, gamma: float = 2.0) -> jax.Array:
    """Return -(1 - 2 max(0, P - 1/2))^gamma log P with P = sigmoid(chosen - rejected), [B] (arXiv:2403.17297 eq. 1).

    Args:
      chosen, rejected: scores, [B]. gamma: how fast pairs that are told apart fade.
    """
    difference = wide(chosen) - wide(rejected)
    # 1 - 2 max(0, P - 1/2) = min(1, 2 sigmoid(-difference)), whose logarithm does not round to -inf as P rounds to 1.
    log_factor = jnp.minimum(math.log(2.0) + jax.nn.log_sigmoid(-difference), 0.0)
    return -jnp.exp(gamma * log_factor) * jax.nn.log_sigmoid(difference)


def log_barrier(scores: jax.Array, bound: float = 5.0) -> jax.Array:
    """Return -(log(score + bound) + log(bound - score)), [B] (arXiv:2403.17297 eq. 2).

    From 0.9999 of the bound on it goes on along its tangent: a score that an update threw outside, where the formula
    has no value, is pushed back.
    """
    scores = wide(scores)
    edge = _BARRIER_SHARE * bound
    inside = jnp.clip(scores, -edge, edge)
    slope = 2 * edge / (bound**2 - edge**2)
    return -(jnp.log(inside + bound) + jnp.log(bound - inside)) + slope * jnp.abs(scores - inside)


def center_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Return (chosen + rejected)^2, [B], which keeps scores around 0 (arXiv:2312.09244)."""
    return jnp.square(wide(chosen) + wide(rejected))
