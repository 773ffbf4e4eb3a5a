"""Log-probabilities of texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.token_rows import batch_of
from jaxllm.generate.decoding import Weights
from jaxllm.generate.engine import bucket
from jaxllm.losses.lm import chunked_cross_entropy
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.decoder import head_kernel
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.types import Batch, Params

_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probability of a text.

    Attributes:
      sum_logprob: nats, over all its tokens. num_tokens: how many.
    """

    sum_logprob: float
    num_tokens: int


def score_rows(
    spec: ModelSpec,
    params: Params,
    rows: Sequence[Sequence[int]],
    *,
    num_start: int,
    batch_size: int,
    prefix_ids: PrefixIds | None = None,
    adapter: Adapter | None = None,
    attention_impl: AttentionImpl | None = None,
) -> list[Score]:
    """Score rows of ids, in batches of rows of like length.

    Args:
      num_start: ids that open each row and are not scored.
      prefix_ids: special ids of a model whose prefix all tokens see.
      adapter, attention_impl: as in `nn.model.apply`.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores: dict[int, Score] = {}
    for first in range(0, len(rows), batch_size):
        members = order[first : first + batch_size]
        width = bucket(max(len(rows[i]) for i in members))
        ids = np.zeros((len(members), width), np.int32)
        valid = np.zeros((len(members), width), np.int32)
        for place, i in enumerate(members):
            ids[place, : len(rows[i])] = rows[i]
            valid[place, : len(rows[i])] = 1
        # The rows' own lengths, not the bucket's, are what length-dependent positions must see.
        lengths = jnp.asarray(valid.sum(axis=1), jnp.int32)
        batch = batch_of(spec, ids, valid, prefix_ids=prefix_ids).replace(rope_length=lengths)
        missing = batch_size - len(members)  # the last batch has the others' shape, so that nothing compiles again
        batch = jax.tree.map(lambda part: jnp.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)), batch)  # noqa: B023
        sums = _score_batch(spec, Weights(params, adapter), batch, num_start, attention_impl)
        for place, i in enumerate(members):
            scores[i] = Score(sum_logprob=float(sums[place]), num_tokens=len(rows[i]) - num_start)
    return [scores[i] for i in range(len(rows))]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _score_batch(
    spec: ModelSpec, weights: Weights, batch: Batch, num_start: int, impl: AttentionImpl | None
) -> jax.Array:
    params, adapter = weights
    output = apply(spec, params, batch, return_logits=False, adapter=adapter, attention_impl=impl)
    hidden = output.hidden[:, num_start - 1 : -1]
    scored = (batch.segment_ids[:, num_start:] != 0).astype(jnp.float32)
    kernel, targets = head_kernel(spec, params), batch.tokens[:, num_start:]
    return -jnp.sum(chunked_cross_entropy(hidden, kernel, targets, scored, chunk=_CHUNK), axis=1)
