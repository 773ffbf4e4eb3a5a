"""Group relative policy optimisation: advantages and losses, computed in promote_types(input, float32).

All [B, T] arrays are aligned: slot t is about the choice of one token; mask 0 = no such choice. Answers to one prompt
are a group and stand in `group_size` rows after each other.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.losses.masked import counts, masked, sequence_logps, wide

RATIOS = ("token", "sequence", "whole")
REDUCTIONS = ("sequence_mean", "token_mean", "fixed")


def group_advantages(
    rewards: jax.Array, group_size: int, *, std: str | None = "population", eps: float = 0.0
) -> jax.Array:
    """Return (reward - mean) / (deviation + eps) within each group, [B]; 0 where all its rewards are equal.

    (arXiv:2402.03300 section 4.1.2; std None: arXiv:2503.20783 section 3.2)

    Args:
      rewards: [B]. std: "population" (over the count), "sample" (over count - 1) or None (no division).

    Raises:
      ValueError: the rows are not a multiple of group_size, or an unknown std.
    """
    groups = _groups(wide(rewards), group_size)
    members = jnp.ones(groups.shape, bool)
    return _normalized(groups, members, std, eps).reshape(rewards.shape)


def process_advantages(
    step_rewards: jax.Array,
    step_ends: jax.Array,
    mask: jax.Array,
    group_size: int,
    *,
    std: str | None = "population",
    eps: float = 0.0,
) -> jax.Array:
    """Return the sum of the normalised rewards of all steps that end at a token or later, [B, T].

    Rewards are normalised over all steps of a group as in `group_advantages` (arXiv:2402.03300 section 4.1.3).

    Args:
      step_rewards: [B, S]. step_ends: int [B, S], the slot of each step's last token; -1: an answer has fewer steps.

    Raises:
      ValueError: as `group_advantages`.
    """
    steps = _groups(wide(step_rewards), group_size)
    present = _groups(step_ends, group_size) >= 0
    normalized = _normalized(steps, present, std, eps).reshape(step_rewards.shape)
    not_after = jnp.arange(mask.shape[-1])[None, :, None] <= step_ends[:, None, :]
    return masked(jnp.sum(jnp.where(not_after, normalized[:, None, :], 0), axis=-1), mask)


def k1_kl(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Return log(policy / reference), [B, T]: unbiased, of either sign (joschu.net/blog/kl-approx.html)."""
    return wide(logps) - wide(ref_logps)


def k2_kl(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Return log(policy / reference)^2 / 2, [B, T]: never negative, slightly biased (as `k1_kl`)."""
    return jnp.square(k1_kl(logps, ref_logps)) / 2


def k3_kl(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Return q - log q - 1 with q = reference / policy, [B, T]: unbiased, never negative (arXiv:2402.03300 eq. 4)."""
    log_ratio = -k1_kl(logps, ref_logps)
    return jnp.expm1(log_ratio) - log_ratio


class GRPOTerms(NamedTuple):
    """What each token adds, [B, T] each, 0 outside the mask."""

    losses: jax.Array
    kl: jax.Array  # the k3 estimate, before its coefficient; 0 without a reference
    clipped_low: jax.Array  # bool: the ratio is below its range and the advantage negative
    clipped_high: jax.Array  # bool: above its range and the advantage positive


def grpo_terms(
    logps: jax.Array,
    old_logps: jax.Array,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ratio: str = "token",
) -> GRPOTerms:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3 of each token.

    With r = policy / old policy
      token     of each token (arXiv:2402.03300 eq. 3)
      sequence  the geometric mean over an answer's tokens (GSPO, arXiv:2507.18071 eq. 7); k3 is each token's
      whole     of whole answers, k3 too (arXiv:2405.04434 eq. 32-33); use it with the reduction "sequence_mean"

    Args:
      ref_logps: None where kl_coef is 0. advantages: [B], or [B, T].

    Raises:
      ValueError: an unknown ratio, or a KL term without a reference.
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}; expected one of {', '.join(RATIOS)}")
    if ref_logps is None and kl_coef:
        raise ValueError(f"kl_coef is {kl_coef} and there is no ref_logps; expected kl_coef 0 or a reference")
    advantages = masked(advantages if advantages.ndim == mask.ndim else _spread(advantages, mask), mask)
    ratios = jnp.exp(_log_ratio(logps, old_logps, mask, ratio))
    limited = jnp.clip(ratios, 1 - clip_low, 1 + clip_high)
    losses = -jnp.minimum(ratios * advantages, limited * advantages)
    kl = jnp.zeros_like(losses)
    if ref_logps is not None:
        # k3 of two log-probabilities depends on their difference alone.
        log_ratio = _log_ratio(logps, ref_logps, mask, "whole" if ratio == "whole" else "token")
        kl = masked(k3_kl(log_ratio, jnp.zeros_like(log_ratio)), mask)
        losses = losses + kl_coef * kl
    low, high = (ratios < 1 - clip_low) & (advantages < 0), (ratios > 1 + clip_high) & (advantages > 0)
    return GRPOTerms(losses, kl, low, high)


def grpo_weights(
    mask: jax.Array, *, reduction: str, max_length: int | None = None, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Return (weights [B, T], denominators [B]): a loss is sum(weights * terms) / sum(denominators) over all rows.

      sequence_mean  mean over an answer's tokens, then over answers (arXiv:2402.03300 eq. 3)
      token_mean     mean over all tokens (DAPO, arXiv:2503.14476 eq. 8)
      fixed          sum over an answer's tokens / max_length, mean over answers (Dr. GRPO, arXiv:2503.20783)

    An answer without a trained token counts as one whose loss is 0.

    Raises:
      ValueError: an unknown reduction, or "fixed" without max_length.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if reduction == "fixed" and max_length is None:
        raise ValueError("reduction 'fixed' needs max_length, the tokens that each answer is divided by")
    ones = (mask != 0).astype(dtype)
    if reduction == "token_mean":
        return ones, jnp.sum(ones, axis=-1)
    lengths = counts(mask, dtype) if reduction == "sequence_mean" else jnp.full(mask.shape[:-1], max_length, dtype)
    return ones / lengths[:, None], jnp.ones(mask.shape[:-1], dtype)


def grpo_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    ref_logps: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ratio: str = "token",
    reduction: str = "sequence_mean",
    max_length: int | None = None,
) -> jax.Array:
    """Return the loss of a whole batch, a scalar: `grpo_terms` reduced by `grpo_weights`."""
    terms = grpo_terms(
        logps,
        old_logps,
        ref_logps,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
        ratio=ratio,
    )
    weights, denominators = grpo_weights(mask, reduction=reduction, max_length=max_length, dtype=terms.losses.dtype)
    return jnp.sum(weights * terms.losses) / jnp.maximum(jnp.sum(denominators), 1)


def _log_ratio(logps: jax.Array, others: jax.Array, mask: jax.Array, ratio: str) -> jax.Array:
    """Return log(policy / other) as `ratio` wants it, spread over each row's tokens, 0 outside the mask."""
    log_ratio = masked(wide(logps) - wide(others), mask)
    if ratio == "token":
        return log_ratio
    return masked(_spread(sequence_logps(log_ratio, mask, mean=ratio == "sequence"), mask), mask)


def _spread(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.broadcast_to(values[:, None], mask.shape)


def _groups(values: jax.Array, group_size: int) -> jax.Array:
    """Put all values of a group in one row, [groups, values]."""
    if group_size < 1 or values.shape[0] % group_size:
        raise ValueError(f"group_size is {group_size}; expected a divisor of the {values.shape[0]} rows")
    return values.reshape(values.shape[0] // group_size, -1)


def _normalized(groups: jax.Array, members: jax.Array, std: str | None, eps: float) -> jax.Array:
    """Return (value - mean) / (std + eps) over the members of each row; 0 elsewhere and where all are equal."""
    if std not in ("population", "sample", None):
        raise ValueError(f"std is {std!r}; expected 'population', 'sample' or None")
    number = counts(members, groups.dtype)[:, None]
    centered = masked(groups - jnp.sum(masked(groups, members), axis=-1, keepdims=True) / number, members)
    # Rounding leaves a deviation that is not quite 0 where, say, all rewards are 0.1.
    largest = jnp.max(jnp.where(members, groups, -jnp.inf), axis=-1, keepdims=True)
    equal = largest == jnp.min(jnp.where(members, groups, jnp.inf), axis=-1, keepdims=True)
    if std is None:
        return jnp.where(equal, 0, centered)
    freedom = number if std == "population" else jnp.maximum(number - 1, 1)
    deviation = jnp.sqrt(jnp.sum(jnp.square(centered), axis=-1, keepdims=True) / freedom)
    return jnp.where(equal, 0, centered / jnp.where(equal, 1, deviation + eps))
