"""Choosing the next token."""

from __future__ import annotations

import dataclasses
import math
import numbers

import flax.struct
import jax
import jax.numpy as jnp

from jaxllm.errors import InputError


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

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array
    num_ids: jax.Array


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
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(min(sampling.top_k or num_ids, num_ids)),
        # A sum of probabilities may round to more than 1 before the last token: a limit of 1 must keep them all.
        top_p=jnp.float32(jnp.inf if sampling.top_p in (None, 1.0) else sampling.top_p),
        repetition_penalty=jnp.float32(sampling.repetition_penalty),
        num_ids=jnp.int32(num_ids),
    )
    return kind, values


def next_token(
    logits: jax.Array, seen: jax.Array | None, key: jax.Array, kind: SamplingKind, values: SamplingValues
) -> jax.Array:
    """Choose one token id per row, int32 [B].

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], tokens that the repetition penalty applies to; None without a penalty.
    """
    logits = jnp.where((jnp.arange(logits.shape[-1]) < values.num_ids)[None], logits, -jnp.inf)
    if kind.penalised:
        penalty = values.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if kind.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / values.temperature
    if kind.filtered:
        logits = jnp.where(logits >= _threshold(logits, values), logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _threshold(logits: jax.Array, values: SamplingValues) -> jax.Array:
    """Return the smallest logit kept by top-k, then top-p among those, [B, 1]."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    in_top_k = (jnp.arange(ordered.shape[-1]) < values.top_k)[None]
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = in_top_k & (before < values.top_p)
    return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
