"""Forward passes over more rows than a step has at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_microbatches(function: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Map function(rows, ...) over microbatches of rows, dealt to them as in a training step: no row leaves its device.

    Args:
      function: returns a tree of arrays whose first axis is that of the rows.
      parts: microbatches, a divisor of the rows.
    """

    def cut(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 1, 0)

    def join(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:])

    def run(rows: Any, *rest: Any) -> Any:
        if parts == 1:
            return function(rows, *rest)
        results = jax.lax.map(lambda microbatch: function(microbatch, *rest), jax.tree.map(cut, rows))
        return jax.tree.map(join, results)

    return run
