"""The training loss as published code reports it, with the gradients that published code trains with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.token_rows import require_shape
from jaxllm.errors import InputError
from jaxllm.losses.lm import cross_entropy, max_z_loss
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.train.balance import balance_losses
from jaxllm.types import Batch, Params

IGNORED_LABEL = -100


def placed_labels(labels: np.ndarray | None, batch: Batch, vocab_size: int, *, aligned: bool) -> np.ndarray:
    """Return what the logits of the first T' places of a batch [B, T] predict, int [B, T'].

    Args:
      labels: int [B, T], IGNORED_LABEL where nothing is trained; None: every valid token that has one before it.
      aligned: labels are what the logits of their own place predict, T' = T; else they are the input's own tokens, each
        predicted one place before, T' = T - 1.

    Raises:
      InputError: another shape or dtype, labels outside the vocabulary, or nothing to train on.
    """
    valid = np.asarray(batch.segment_ids) != 0
    given = np.asarray(batch.tokens) if labels is None else _checked_labels(labels, valid.shape, vocab_size)
    if aligned and labels is not None:
        placed = np.where(valid, given, IGNORED_LABEL)
    else:
        placed = np.where(valid[:, 1:] & valid[:, :-1], given[:, 1:], IGNORED_LABEL)
    if not (placed != IGNORED_LABEL).any():
        raise InputError("loss_and_grads: no token is left to train on: every label is -100 or padding")
    return placed


def _checked_labels(labels: np.ndarray, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    labels = np.asarray(labels)
    require_shape("labels", labels, shape)
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be integers, found {labels.dtype}")
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))]
    if wrong.size:
        raise InputError(f"labels hold {wrong[0]}; expected {IGNORED_LABEL} or 0 to {vocab_size - 1}")
    return labels


@functools.partial(jax.jit, static_argnums=(0, 4))
def loss_and_gradients(
    spec: ModelSpec,
    params: Params,
    batch: Batch,
    labels: jax.Array,
    attention_impl: AttentionImpl | None = None,
    adapter: Adapter | None = None,
) -> tuple[jax.Array, Params]:
    """Return the mean cross-entropy, with the checkpoint's own max-z loss, and the gradients.

    Balance losses of mixtures are in the gradients alone.

    Args:
      labels: int [B, T'], what the logits of the first T' places predict; IGNORED_LABEL where nothing is trained.
      attention_impl, adapter: as in `nn.model.apply`.
    """

    def mean_loss(params: Params) -> tuple[jax.Array, jax.Array]:
        output = apply(spec, params, batch, train=True, adapter=adapter, attention_impl=attention_impl)
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
