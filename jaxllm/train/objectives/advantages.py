"""From what answers are worth to what each of their tokens contributed; all rows of a round at once.

The arrays [R, T] lie on the mesh; slot t is about the choice of token t + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.config.alignment import GRPOConfig, PPOConfig
from jaxllm.losses.grpo import group_advantages, process_advantages
from jaxllm.losses.ppo import gae, kl_rewards, whiten
from jaxllm.types import Batch, RolloutBatch


class Measured(NamedTuple):
    """What models say of the sampled tokens, float32 [R, T] each.

    Attributes:
      logps: log-probabilities under the policy that sampled; None: those of the sampling stand for them.
      ref_logps: under the reference, or None.
      values: of the value model, or None.
    """

    logps: jax.Array | None
    ref_logps: jax.Array | None = None
    values: jax.Array | None = None


class Judged(NamedTuple):
    """What answers are worth.

    Attributes:
      scores: float32 [R], of whole answers.
      step_scores, step_ends: float32 and int32 [R, S], what each step is worth and the slot of its last token (-1: no
        such step), or None.
      kl_coef: float32 [], weight of the divergence from the reference in the reward.
    """

    scores: jax.Array
    step_scores: jax.Array | None = None
    step_ends: jax.Array | None = None
    kl_coef: jax.Array | None = None


def group_batch(rows: Batch, measured: Measured, judged: Judged, *, samples: int, config: GRPOConfig) -> RolloutBatch:
    """Return rows with the advantages of answers over others to the same prompt (arXiv:2402.03300 section 4.1).

    Args:
      samples: answers to each prompt.
    """
    mask = rows.loss_weights
    options = dict(std=None if config.std == "none" else config.std, eps=config.eps)
    if config.supervision == "process":
        advantages = process_advantages(judged.step_scores, judged.step_ends, mask, samples, **options)
    else:
        advantages = group_advantages(judged.scores, samples, **options)[:, None] * (mask != 0)
    if config.drop_equal_groups:
        useful = jnp.any(advantages.reshape(-1, samples, mask.shape[1]) != 0, axis=(1, 2))
        rows = rows.replace(loss_weights=mask * jnp.repeat(useful, samples)[:, None])
    return RolloutBatch(rows=rows, old_logps=measured.logps, advantages=advantages, ref_logps=measured.ref_logps)


def actor_critic_batch(rows: Batch, measured: Measured, judged: Judged, *, config: PPOConfig) -> RolloutBatch:
    """Return rows with the advantages of tokens over what the value model expected, and the returns that it learns."""
    mask = rows.loss_weights
    # Without a reference there is no divergence to weigh.
    ref_logps = measured.logps if measured.ref_logps is None else measured.ref_logps
    rewards = kl_rewards(measured.logps, ref_logps, judged.scores, mask, kl_coef=judged.kl_coef)
    advantages, returns = gae(rewards, measured.values, mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return RolloutBatch(
        rows=rows, old_logps=measured.logps, advantages=advantages, returns=returns, old_values=measured.values
    )
