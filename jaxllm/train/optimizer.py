"""AdamW with decoupled weight decay (arXiv:1711.05101) and global-norm clipping, built from optax.

The learning rate is no part of the optimizer: the loop computes it and hands it to each update. All arithmetic and
the moments are in float32, or in float64 for float64 parameters, whatever the dtype of parameters and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.config.schema import OptimizerConfig
from jaxllm.types import Params


def make_optimizer(
    config: OptimizerConfig, decay_mask: Any | None, *, clip_entries: bool = False
) -> optax.GradientTransformation:
    """Build the transformation of gradients into descent directions of unit learning rate.

    Order: clip to `clip_norm`, Adam, add `weight_decay` * parameter.

    Args:
      config: what to build.
      decay_mask: pytree of bool shaped like the parameters, True where `decay: matrices` decays. Shapes do not tell
        (stacked layers give norm scales two dimensions), so it comes from the parameter declarations. May be None
        for `decay: all`.
      clip_entries: each entry of the parameters is clipped by its own norm.
    """
    if config.decay == "matrices" and decay_mask is None:
        raise ValueError("decay_mask: optimizer.decay 'matrices' needs a pytree of bool, got None")
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    clip = _on_entries(clip) if clip_entries else clip
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask if config.decay == "matrices" else None)
    return _in_float32(optax.chain(clip, adam, decay))


def update_params(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: Any,
    params: Params,
    *,
    learning_rate: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike],
) -> tuple[Params, Any, jax.Array]:
    """Take one optimizer step; return (params, opt_state, global gradient norm before clipping)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    # The clipping computes the same norm; within one jit the compiler merges the two.
    return apply_updates(params, updates, learning_rate), opt_state, optax.tree.norm(_promote(grads))


def apply_updates(
    params: Params, updates: Params, learning_rate: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike]
) -> Params:
    """Return params - learning_rate * updates, in the parameters' dtypes.

    Args:
      learning_rate: one for all, or a dict of one for each entry of the parameters.
    """
    if isinstance(learning_rate, Mapping):
        return {name: apply_updates(params[name], updates[name], rate) for name, rate in learning_rate.items()}
    return jax.tree.map(lambda p, u: (p.astype(u.dtype) - learning_rate * u).astype(p.dtype), params, updates)


def _on_entries(stateless: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(grads: Params, params: Params | None) -> Params:
        del params
        return {name: stateless.update(grad, optax.EmptyState())[0] for name, grad in grads.items()}

    return optax.stateless(update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params):
        return inner.init(_promote(params))

    def update(grads, state, params=None):
        return inner.update(_promote(grads), state, _promote(params))

    return optax.GradientTransformation(init, update)


def _promote(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
