"""What flash attention's kernels say that they cost."""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl

from kernels_pallas.options import Options


def attention_cost(pairs: int, widths: int, arrays: object) -> pl.CostEstimate:
    """Return the cost of a kernel.

    Args:
      pairs: of queries and keys, all heads together.
      widths: head dims of its products, summed.
      arrays: that it reads and writes, each once.
    """
    return pl.CostEstimate(flops=2 * pairs * widths, transcendentals=pairs, bytes_accessed=_num_bytes(arrays))


def visible_pairs(length: int, slots: int, options: Options) -> int:
    """Return how many pairs a head computes at most: windows and segments are data."""
    return length * slots - (min(length, slots) * (min(length, slots) - 1) // 2 if options.causal else 0)


def _num_bytes(arrays: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
