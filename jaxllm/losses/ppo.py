"""Proximal policy optimisation: rewards, advantages and losses, computed in promote_types(input, float32).

All [B, T] arrays are aligned: slot t is about the choice of one token; mask 0 = no such choice, 0 is returned there.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.losses.masked import masked, masked_mean, wide

# As in the reference implementations: keeps whitening finite where all values are equal.
_WHITEN_EPS = 1e-8


def kl_rewards(
    logps: jax.Array, ref_logps: jax.Array, scores: jax.Array, mask: jax.Array, *, kl_coef: float
) -> jax.Array:
    """Return -kl_coef * log(policy / reference) at each token, plus the score at the last one, [B, T].

    (arXiv:2009.01325 section 3.4, arXiv:2203.02155 eq. 2)

    Args:
      logps, ref_logps: log-probabilities of the sampled tokens, nats. scores: of whole answers, [B].
    """
    rewards = masked(-kl_coef * (wide(logps) - wide(ref_logps)), mask)
    slots = jnp.arange(mask.shape[-1])[None]
    last = jnp.max(jnp.where(mask != 0, slots, -1), axis=-1, keepdims=True)
    return rewards + jnp.where(slots == last, wide(scores)[:, None], 0)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Return (advantages, returns), both [B, T], by generalised advantage estimation (arXiv:1506.02438 eq. 16).

    With delta_t = r_t + gamma V_(t+1) - V_t, A_t = delta_t + gamma lam A_(t+1), where t + 1 is the next choice in the
    mask and V = A = 0 after the last; returns are A + V.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)

    def back(later, slot):
        later_value, later_advantage = later
        reward, value, chosen = slot
        advantage = reward + gamma * later_value - value + gamma * lam * later_advantage
        here = jnp.where(chosen, value, later_value), jnp.where(chosen, advantage, later_advantage)
        return here, jnp.where(chosen, advantage, 0)

    slots = tuple(jnp.moveaxis(array, -1, 0) for array in (rewards, values, mask != 0))
    start = (jnp.zeros_like(values[:, 0]), jnp.zeros_like(values[:, 0]))
    advantages = jnp.moveaxis(jax.lax.scan(back, start, slots, reverse=True)[1], 0, -1)
    return advantages, advantages + values


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return x less its mean over its deviation, both over all that the mask counts; shaped as x.

    The variance is over count - 1, as in the usual implementations; `group_advantages` of one group takes others.
    """
    centered = masked(wide(x) - masked_mean(x, mask), mask)
    freedom = jnp.maximum(jnp.sum(mask != 0) - 1, 1).astype(centered.dtype)
    return centered * jax.lax.rsqrt(jnp.sum(jnp.square(centered)) / freedom + _WHITEN_EPS)


class ClippedTerms(NamedTuple):
    """A loss of each token and whether the clipped branch was the larger one, both [B, T]."""

    losses: jax.Array
    clipped: jax.Array


def policy_terms(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array, *, clip: float
) -> ClippedTerms:
    """Return max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = policy / old policy (arXiv:1707.06347 eq. 7)."""
    ratio = jnp.exp(masked(wide(logps) - wide(old_logps), mask))
    plain = masked(-wide(advantages) * ratio, mask)
    limited = masked(-wide(advantages) * jnp.clip(ratio, 1 - clip, 1 + clip), mask)
    return ClippedTerms(jnp.maximum(plain, limited), limited > plain)


def policy_loss(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array, *, clip: float
) -> jax.Array:
    """Return the mean of `policy_terms` over all tokens, a scalar."""
    return masked_mean(policy_terms(logps, old_logps, advantages, mask, clip=clip).losses, mask)


def value_terms(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float | None = None
) -> ClippedTerms:
    """Return half the squared error of each value, the larger one of it and of the value kept near its old one.

    (arXiv:1707.06347 eq. 9; the clipping: arXiv:2005.12729 section 3)

    Args:
      clip: how far a value may leave old_values; None: no limit, old_values are not read.
    """
    values, returns = masked(values, mask), masked(returns, mask)
    plain = jnp.square(values - returns) / 2
    if clip is None:
        return ClippedTerms(plain, jnp.zeros_like(plain, bool))
    old_values = masked(old_values, mask)
    limited = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns) / 2
    return ClippedTerms(jnp.maximum(plain, limited), limited > plain)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float | None = None
) -> jax.Array:
    """Return the mean of `value_terms` over all tokens, a scalar."""
    return masked_mean(value_terms(values, old_values, returns, mask, clip=clip).losses, mask)


def llama2_scores(safety: jax.Array, helpfulness: jax.Array, is_safety: jax.Array) -> jax.Array:
    """Return the safety score of prompts tagged so and of answers judged unsafe, else the helpfulness score, [B].

    Scores are those of the reward models before the sigmoid. The paper combines probabilities, with 0.15 as the bound
    of unsafe ones, and takes the logit of the result, which is the score again (arXiv:2307.09288 section 3.2.3); it
    whitens them after that.

    Args:
      safety, helpfulness: [B]. is_safety: bool [B].
    """
    safety, helpfulness = wide(safety), wide(helpfulness)
    return jnp.where(is_safety | (jax.nn.sigmoid(safety) < 0.15), safety, helpfulness)


@dataclasses.dataclass
class RunningMoments:
    """Mean and deviation of all values seen so far, merged batch by batch in float64 (Chan, Golub and LeVeque 1979).

    The fields are plain numbers: `dataclasses.asdict` is the state, `RunningMoments(**state)` restores it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """The deviation over count - 1; 1 as long as fewer than two values were seen."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0

    def update(self, values: np.ndarray) -> RunningMoments:
        """Take in values of any shape and return self."""
        values = np.asarray(values, np.float64)
        if values.size:
            count = self.count + values.size
            delta = float(values.mean()) - self.mean
            self.squares += float(np.square(values - values.mean()).sum()) + delta**2 * self.count * values.size / count
            self.mean += delta * values.size / count
            self.count = count
        return self

    def normalize(self, values: np.ndarray, *, divide: bool) -> np.ndarray:
        """Return the values less the running mean, over the running deviation if `divide`, in float64."""
        centered = np.asarray(values, np.float64) - self.mean
        return centered / max(self.std, _WHITEN_EPS) if divide else centered
