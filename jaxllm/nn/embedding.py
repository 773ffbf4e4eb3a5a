"""Rows of an embedding table."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.sharding.rules import constrain
from jaxllm.sharding.staged import gather, manual_axes


def embed(table: jax.Array, ids: jax.Array, axes: tuple[str, str], dtype: jnp.dtype) -> jax.Array:
    """Look ids [B, T] up in a table [V, D] with these logical axes; [B, T, D] in `dtype`, hidden dimension whole."""
    if manual_axes():
        return _rows(gather(table.astype(dtype), axes), ids)
    # First as the table lies, then as activations lie: told only the second, XLA replicates the whole batch.
    rows = constrain(jnp.take(table, ids, axis=0), "replicas", "length", axes[1]).astype(dtype)
    return constrain(rows, "batch", "length", "act_embed")


@jax.custom_vjp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Return table[ids]; the gradients of a row, of which there may be thousands, are added up in float32."""
    return jnp.take(table, ids, axis=0)


def _rows_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    ids, table = saved
    total = jnp.zeros(table.shape, jnp.promote_types(table.dtype, jnp.float32))
    return constrain(total, "vocab", None).at[ids].add(gradient.astype(total.dtype)).astype(table.dtype), None


_rows.defvjp(lambda table, ids: (_rows(table, ids), (ids, table)), _rows_backward)
