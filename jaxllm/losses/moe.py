"""Losses that balance a mixture's experts: scalars, or one per sequence, computed in promote_types(input, float32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.losses.masked import wide


def load_balancing_loss(router_logits: jax.Array, *, top_k: int, mask: jax.Array | None = None) -> jax.Array:
    """Return E * sum_e (selections of e per token) * (mean probability of e), a scalar.

    This is Mixtral's form of arXiv:2101.03961 eq. 4: with top_k selections it is top_k at perfect balance.

    Args:
      router_logits: [..., E]; all leading axes, layers too, are pooled. mask: broadcastable to [...], 0 = padding.
    """
    probs = jax.nn.softmax(wide(router_logits), axis=-1)
    selected = jnp.sum(jax.nn.one_hot(jax.lax.top_k(probs, top_k)[1], probs.shape[-1], dtype=probs.dtype), axis=-2)
    return probs.shape[-1] * jnp.sum(_token_mean(selected, mask) * _token_mean(probs, mask))


def router_z_loss(router_logits: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Return the mean of logsumexp(logits)^2 over all tokens, a scalar (arXiv:2202.08906 eq. 5, there times 1e-3).

    Args:
      router_logits: [..., E]. mask: broadcastable to [...], 0 = padding.
    """
    return _token_mean(jnp.square(jax.nn.logsumexp(wide(router_logits), axis=-1, keepdims=True)), mask)[0]


def expert_balance_loss(load: jax.Array, mean_probs: jax.Array) -> jax.Array:
    """Return sum_e f_e P_e of each sequence, [...] (arXiv:2405.04434 eq. 23-25).

    Args:
      load: [..., E], selections of each expert. mean_probs: [..., E], mean affinity to each expert.
    """
    probs = wide(mean_probs)
    return jnp.sum(_relative(load, probs.dtype) * probs, axis=-1)


def device_balance_loss(load: jax.Array, mean_probs: jax.Array, *, num_devices: int) -> jax.Array:
    """Return sum_d f'_d P'_d of each sequence, [...] (arXiv:2405.04434 eq. 26-28).

    Args:
      load, mean_probs: [..., E] as for `expert_balance_loss`. num_devices: equal runs of experts.
    """
    probs = wide(mean_probs)
    share = jnp.mean(_by_device(_relative(load, probs.dtype), num_devices), axis=-1)
    return jnp.sum(share * jnp.sum(_by_device(probs, num_devices), axis=-1), axis=-1)


def communication_balance_loss(
    sent: jax.Array, mean_probs: jax.Array, num_tokens: jax.Array, *, devices_per_token: int
) -> jax.Array:
    """Return sum_d f''_d P''_d of each sequence, [...] (arXiv:2405.04434 eq. 29-31).

    Args:
      sent: [..., devices], tokens that selected an expert of each device. mean_probs: [..., E].
      num_tokens: [...]. devices_per_token: the most devices that a token is sent to, M.
    """
    num_devices, probs = sent.shape[-1], wide(mean_probs)
    sent, num_tokens = (jnp.asarray(counts, probs.dtype) for counts in (sent, num_tokens))
    share = sent * (num_devices / devices_per_token) / jnp.maximum(num_tokens, 1)[..., None]
    return jnp.sum(share * jnp.sum(_by_device(probs, num_devices), axis=-1), axis=-1)


def balance_loss(
    load: jax.Array,
    mean_probs: jax.Array,
    sent: jax.Array,
    num_tokens: jax.Array,
    *,
    devices_per_token: int,
    expert: float = 0.0,
    device: float = 0.0,
    communication: float = 0.0,
    per_sequence: bool = True,
) -> jax.Array:
    """Return the weighted sum of DeepSeek-V2's three losses for each layer, [...].

    Args:
      load: [..., B, E]. mean_probs: [..., B, E]. sent: [..., B, devices]. num_tokens: [..., B].
      devices_per_token: the most devices that a token is sent to.
      expert, device, communication: the weights alpha_1, alpha_2, alpha_3.
      per_sequence: mean over the sequences that have tokens; False: the batch counts as one sequence.
    """
    if not per_sequence:
        total = jnp.sum(num_tokens, axis=-1, keepdims=True)
        mean_probs = jnp.sum(mean_probs * num_tokens[..., None], axis=-2, keepdims=True)
        mean_probs = mean_probs / jnp.maximum(total, 1)[..., None]
        load, sent = (jnp.sum(counts, axis=-2, keepdims=True) for counts in (load, sent))
        num_tokens = total
    losses = (
        expert * expert_balance_loss(load, mean_probs)
        + device * device_balance_loss(load, mean_probs, num_devices=sent.shape[-1])
        + communication * communication_balance_loss(sent, mean_probs, num_tokens, devices_per_token=devices_per_token)
    )
    return jnp.sum(losses, axis=-1) / jnp.maximum(jnp.sum(num_tokens > 0, axis=-1), 1)


def _relative(load: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the load over its mean: f_e = E / (k T) * count_e, where all counts add up to k T."""
    load = jnp.asarray(load, dtype)
    return load * load.shape[-1] / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)


def _by_device(values: jax.Array, num_devices: int) -> jax.Array:
    return values.reshape(*values.shape[:-1], num_devices, -1)


def _token_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Average [..., E] over its leading axes; 0 where the mask leaves nothing."""
    weights = jnp.broadcast_to(1 if mask is None else mask, values.shape[:-1]).astype(values.dtype)[..., None]
    axes = tuple(range(values.ndim - 1))
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights != 0, values * weights, 0), axis=axes) / jnp.where(total == 0, 1, total)
