"""The training loss as published code reports it, with the gradients that published code trains with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.losses.lm import cross_entropy, max_z_loss
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.train.balance import balance_losses
from jaxllm.types import Batch, Params

IGNORED_LABEL = -100


@functools.partial(jax.jit, static_argnums=(0, 4))
def loss_and_gradients(
    spec: ModelSpec, params: Params, batch: Batch, labels: jax.Array, attention_impl: AttentionImpl | None = None
) -> tuple[jax.Array, Params]:
    """Return the mean cross-entropy, with the checkpoint's own max-z loss, and the gradients.

    Balance losses of mixtures are in the gradients alone.

    Args:
      labels: int [B, T'], what the logits of the first T' places predict; IGNORED_LABEL where nothing is trained.
    """

    def mean_loss(params: Params) -> tuple[jax.Array, jax.Array]:
        output = apply(spec, params, batch, train=True, attention_impl=attention_impl)
        logits = output.logits[:, : labels.shape[1]]
        weights = (labels != IGNORED_LABEL).astype(logits.dtype)
        loss = jnp.sum(cross_entropy(logits, labels, weights)) / jnp.sum(weights)
        if spec.head.max_z_loss:
            # As published, over all places, trained or not.
            loss += spec.head.max_z_loss * jnp.mean(max_z_loss(logits))
        balance = 0.0 if spec.moe is None else balance_losses(spec.moe, output.aux.statistics)
        return loss + balance, loss

    gradients, loss = jax.grad(mean_loss, has_aux=True)(params)
    return loss, gradients
