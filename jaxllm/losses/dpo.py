"""Direct preference optimisation: losses per pair, unreduced, computed in promote_types(input, float32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.losses.masked import wide

DPO_VARIANTS = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo")


def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    *,
    beta: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> jax.Array:
    """Return the loss of each pair, [B].

    With h = log(policy_chosen / policy_rejected) - log(ref_chosen / ref_rejected) and label smoothing e:
      sigmoid       -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)  (arXiv:2305.18290 eq. 7; e: its cDPO note)
      sigmoid_norm  the same, of log-probabilities that are means over tokens
      robust        (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)  (arXiv:2403.00409)
      hinge         max(0, 1 - beta h)  (hinge-norm of arXiv:2309.06657)
      ipo           (h - 1 / (2 beta))^2  (arXiv:2310.12036 eq. 17), there of sums, usually of means over tokens

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: log-probabilities of whole answers in nats, [B]: sums
        over their tokens, or means (`sequence_logps`).
      reference_free: the reference is taken to be uniform; ref_chosen and ref_rejected are not read.

    Raises:
      ValueError: an unknown variant, or label smoothing where the variant has none.
    """
    if variant not in DPO_VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {', '.join(DPO_VARIANTS)}")
    if label_smoothing and variant in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing is {label_smoothing}; the variant {variant!r} has none, expected 0")
    log_ratio = wide(policy_chosen) - wide(policy_rejected)
    if not reference_free:
        log_ratio = log_ratio - (wide(ref_chosen) - wide(ref_rejected))
    if variant == "hinge":
        return jnp.maximum(1 - beta * log_ratio, 0)
    if variant == "ipo":
        return jnp.square(log_ratio - 1 / (2 * beta))
    right, flipped = -jax.nn.log_sigmoid(beta * log_ratio), -jax.nn.log_sigmoid(-beta * log_ratio)
    if variant == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def implicit_rewards(policy: jax.Array, ref: jax.Array, *, beta: float) -> jax.Array:
    """Return beta * (policy - ref), the reward that the policy stands for, [B] (arXiv:2305.18290 eq. 5)."""
    return beta * (wide(policy) - wide(ref))
