"""Dropout and noise that depend on nothing but the row: neither on the mesh nor on what else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

# Where in a layer something is dropped; folded into the keys.
ATTENTION, FEED_FORWARD = 0, 1
_NEFTUNE, _EMBEDDING, _LAYERS = 0, 1, 2


class Dropout(flax.struct.PyTreeNode):
    """Dropout of activations (Srivastava et al. 2014) with one random key for each row.

    Attributes:
      keys: uint32 [B, 2].
      rate: share of the values that become zero; the others grow by 1 / (1 - rate).
    """

    keys: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drop values of x [B, ...]."""
        kept = draw_by_row(self.keys, lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))
        return jnp.where(kept, x / (1 - self.rate), 0)

    def folded(self, number: int | jax.Array) -> Dropout:
        """Return the same with keys of their own for a layer or a place in it."""
        return self.replace(keys=fold_rows(self.keys, number))


def draw_by_row(keys: jax.Array, draw: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return draw(key) of each row's key, uint32 [B, 2], stacked."""
    return jax.vmap(lambda key: draw(_wrapped(key)))(keys)


def fold_rows(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """Fold a number into each row's key, uint32 [B, 2]."""
    return jax.vmap(lambda key: jax.random.key_data(jax.random.fold_in(_wrapped(key), number)))(keys)


def _wrapped(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def embedding_dropout(keys: jax.Array, rate: float) -> Dropout:
    """Return the dropout of a model's embeddings."""
    return Dropout(fold_rows(keys, _EMBEDDING), rate)


def layer_dropout(keys: jax.Array, rate: float) -> Dropout:
    """Return the dropout of a model's layers, to be folded with a layer's number and a place in it."""
    return Dropout(fold_rows(keys, _LAYERS), rate)


def neftune(x: jax.Array, segment_ids: jax.Array, keys: jax.Array, alpha: float) -> jax.Array:
    """Add uniform noise within alpha / sqrt(L D) to embeddings x [B, T, D] (NEFTune, arXiv:2310.05914 algorithm 1).

    L is the number of tokens of the example that a token belongs to; padding stays as it is.

    Args:
      segment_ids: int32 [B, T], 0 = padding. keys: uint32 [B, 2].
    """
    noise = draw_by_row(
        fold_rows(keys, _NEFTUNE), lambda key: jax.random.uniform(key, x.shape[1:], minval=-1, maxval=1)
    )
    lengths = jax.vmap(lambda ids: jnp.zeros(ids.shape[0] + 1, jnp.int32).at[ids].add(1)[ids])(segment_ids)
    bound = jnp.where(segment_ids != 0, alpha * jax.lax.rsqrt(lengths * jnp.float32(x.shape[-1])), 0)
    return x + (noise * bound[..., None]).astype(x.dtype)
