"""Choosing the next token."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError

_BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: sample among the k most likely tokens only.
      top_p: sample among the fewest tokens whose probabilities reach p (arXiv:1904.09751).
      repetition_penalty: divides positive and multiplies negative logits of tokens already seen (arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, numbers.Real) or not math.isfinite(value)):
                raise InputError(f"{name} must be a finite number, found {value!r}")
        if self.top_k is not None and not isinstance(self.top_k, numbers.Integral):
            raise InputError(f"top_k must be an integer, found {self.top_k!r}")
        if self.temperature < 0:
            raise InputError(f"temperature must be at least 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty must be positive, found {self.repetition_penalty}")


@dataclasses.dataclass(frozen=True)
class SamplingKind:
    """The part of Sampling that changes the compiled program."""

    greedy: bool
    filtered: bool
    penalised: bool


class SamplingValues(flax.struct.PyTreeNode):
    """The part of Sampling that is data: float32 [] each, top_k and num_ids int32 []."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    repetition_penalty: np.ndarray
    num_ids: np.ndarray


def split_sampling(sampling: Sampling, num_ids: int) -> tuple[SamplingKind, SamplingValues]:
    """Separate what is compiled from what is data, so that changing a value compiles nothing.

    Args:
      num_ids: ids from here on are never chosen (rows of a padded embedding table that mean no token).
    """
    kind = SamplingKind(
        greedy=sampling.temperature == 0,
        filtered=sampling.top_k is not None or sampling.top_p is not None,
        penalised=sampling.repetition_penalty != 1.0,
    )
    values = SamplingValues(
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(min(sampling.top_k or num_ids, num_ids)),
        # Small weights vanish in a sum of float32: a limit of 1 would cut where none is meant.
        top_p=np.float32(np.inf if sampling.top_p in (None, 1.0) else sampling.top_p),
        repetition_penalty=np.float32(sampling.repetition_penalty),
        num_ids=np.int32(num_ids),
    )
    return kind, values


def next_token(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, kind: SamplingKind, values: SamplingValues
) -> jax.Array:
    """Choose one token id per row, int32 [B]; a row's choice depends on nothing but its own logits and key.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], tokens that the repetition penalty applies to; None without a penalty.
      keys: random keys [B].
    """
    logits = jnp.where((jnp.arange(logits.shape[-1]) < values.num_ids)[None], logits, -jnp.inf)
    if kind.penalised:
        penalty = values.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if kind.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / values.temperature
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if kind.filtered:
        weights = jnp.where(weights >= _threshold(weights, values), weights, 0)
    return _draw(weights, keys)


def token_logps(logits: jax.Array, tokens: jax.Array, values: SamplingValues) -> jax.Array:
    """Return the log-probability of one token per row at the temperature of `values`, float32 [B].

    It is that of the softmax over all V logits [B, V], as a training loss has it: no token is ruled out.
    """
    logits = logits / values.temperature
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """Draw an index of each row with probability proportional to its weight [B, V], int32 [B].

    First a block of the row, then an index within it: two random numbers instead of V, and a float32 resolves the
    probabilities of a block better than those of a whole vocabulary.
    """
    blocks = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % _BLOCK))).reshape(weights.shape[0], -1, _BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _first_beyond(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_beyond(within, uniform[:, 1])


def _first_beyond(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return the first index up to which the weights [B, N] add up to more than uniform [B] times their sum."""
    sums = jnp.cumsum(weights, axis=-1)
    # Random numbers are multiples of 2^-23 below 1: even rounded the product stays below the last sum, and so an index
    # of weight 0 is never returned.
    return jnp.sum(sums <= (uniform * sums[:, -1])[:, None], axis=-1, dtype=jnp.int32)


def _threshold(weights: jax.Array, values: SamplingValues) -> jax.Array:
    """Return the smallest weight kept by top-k, then top-p among those, [B, 1]; weights are in [0, 1].

    Weights that tie there are all kept.
    """

    def largest(enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return the largest [B, 1] for which `enough` of its weights lie at or above it; 0 where none do."""

        def settle_bit(step: jax.Array, edge: jax.Array) -> jax.Array:
            higher = edge | (1 << (29 - step))
            return jnp.where(enough(jax.lax.bitcast_convert_type(higher, jnp.float32)), higher, edge)

        # Bit by bit, as floats in [0, 1] order as their bits do and all of those lie below 2^30: unlike a sort, sums
        # are cheap, and cross the mesh as one number per row.
        edge = jax.lax.fori_loop(0, 30, settle_bit, jnp.zeros((weights.shape[0], 1), jnp.int32))
        return jax.lax.bitcast_convert_type(edge, jnp.float32)

    def mass(edge: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights >= edge, weights, 0), axis=-1, keepdims=True)

    kth = largest(lambda edge: jnp.sum(weights >= edge, axis=-1, keepdims=True) >= values.top_k)
    needed = values.top_p * mass(kth)
    return jnp.maximum(kth, largest(lambda edge: mass(edge) >= needed))
