"""What flash attention's kernels are compiled for, apart from shapes."""

from __future__ import annotations

import dataclasses
import math

LOG2_E = math.log2(math.e)
"""Scores times this are the exponents of 2 that the kernels compute with."""


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """(queries, keys) of the tiles of the forward pass and of the backward pass, multiples of 128.

    On a TPU one kernel computes all gradients, with the tiles of `dkv`, and holds those of `chunk` keys at once; None:
    as many as fit.
    """

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """The static arguments of a call; scale: softmax_scale; block_sizes None: by device and head dim."""

    scale: float
    causal: bool
    soft_cap: float | None
    block_sizes: BlockSizes | None
    interpret: bool

    @property
    def factor(self) -> float:
        """What turns products of queries and keys into exponents of 2, or into what tanh takes for the soft cap."""
        return self.scale * (LOG2_E if self.soft_cap is None else 1 / self.soft_cap)
