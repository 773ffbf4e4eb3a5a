"""A model as the objectives run it: how it is tuned, computed and sharded, and what of it is wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.losses.lm import weighted_cross_entropy
from jaxllm.nn.decoder import Remat, head_kernel
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply
from jaxllm.nn.param import partition_specs
from jaxllm.nn.score import evaluate
from jaxllm.sharding.rules import ROWS
from jaxllm.sharding.staged import by_rows
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning import Tuning
from jaxllm.types import Batch, ModelOutput, Params

_LOGITS_AT_ONCE = 2**25
_PARTS = 8
"""Of a row, of which those that hold no target that counts are skipped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """A model with the options of a run.

    Attributes:
      tuning: which parameters are trained, which are frozen, and how they make a model.
      compute_dtype: dtype of activations.
      remat: what the backward pass recomputes.
      chunk: positions of each row whose logits exist at once.
      attention_impl: what computes attention, see `nn.model.apply`.
      staged: weights are gathered by hand, see `jaxllm.sharding.staged`; False: as XLA partitions.
      dropout, neftune_alpha: in training only, as in `nn.model.apply`.
    """

    spec: ModelSpec
    tuning: Tuning
    compute_dtype: jnp.dtype
    remat: Remat
    chunk: int
    attention_impl: AttentionImpl | None = None
    staged: bool = False
    dropout: float = 0.0
    neftune_alpha: float | None = None

    @property
    def draws(self) -> bool:
        """Whether training is random."""
        return bool(self.dropout or self.neftune_alpha or self.tuning.draws)

    def map_rows(self, function: Callable, out_specs: Any) -> Callable:
        """Return function(params, frozen, rows, rest), with weights gathered by hand if they are; see `by_rows`."""
        if not self.staged:
            return function
        frozen = self.tuning.frozen()
        specs = (partition_specs(self.tuning.trained()), None if frozen is None else partition_specs(frozen))
        mapped = by_rows(lambda weights, rows, rest: function(*weights, rows, rest), specs, out_specs)
        return lambda params, frozen, rows, rest: mapped((params, frozen), rows, rest)

    def output(
        self,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        *,
        train: bool,
        row_keys: jax.Array | None = None,
        spec: ModelSpec | None = None,
        **options: Any,
    ) -> tuple[ModelOutput, Params, Any]:
        """Run the model without its head; where weights are gathered by hand, inside `map_rows`.

        Args:
          row_keys: uint32 [B, 2]; None: nothing is dropped.
          spec: in place of the model's own. options: others of `nn.model.apply`.

        Returns:
          (output, the model's parameters, its adapter).
        """
        model, adapter = self.tuning.join(params, frozen)
        if row_keys is not None:
            options |= dict(row_keys=row_keys, dropout=self.dropout, neftune_alpha=self.neftune_alpha)
        output = apply(
            spec or self.spec,
            model,
            batch,
            train=train,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            attention_impl=self.attention_impl,
            return_logits=False,
            adapter=adapter,
            **options,
        )
        return output, model, adapter

    def token_logps(
        self,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        *,
        train: bool,
        row_keys: jax.Array | None = None,
        temperature: float = 1.0,
    ) -> jax.Array:
        """Return the log-probabilities of the targets, float32 [B, T], 0 where the loss weight is 0.

        Args:
          temperature: logits are divided by it.
        """

        most = jnp.max(jnp.sum(batch.loss_weights != 0, axis=1))
        chunk = min(self.chunk, -(-batch.tokens.shape[1] // _PARTS))

        def run(params: Params, frozen: Params | None, rows: Any, most: jax.Array) -> jax.Array:
            batch, row_keys = rows
            output, model, adapter = self.output(params, frozen, batch, train=train, row_keys=row_keys)
            kernel = head_kernel(self.spec, model, output.hidden.dtype, adapter)
            counted = (batch.loss_weights != 0).astype(jnp.float32)
            options = dict(most=most, chunk=chunk, temperature=temperature)
            return -weighted_cross_entropy(output.hidden, kernel, batch.targets, counted, **options)

        return self.map_rows(run, ROWS)(params, frozen, (batch, row_keys), most)

    def scores(
        self,
        params: Params,
        frozen: Params | None,
        score: Params,
        batch: Batch,
        *,
        train: bool,
        row_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Return the scalar head's value at every slot, float32 [B, T].

        Args:
          score: {"kernel": [D]}, see `nn.score`.
        """

        def run(params: Params, frozen: Params | None, rows: Any, score: Params) -> jax.Array:
            batch, row_keys = rows
            return evaluate(score, self.output(params, frozen, batch, train=train, row_keys=row_keys)[0].hidden)

        return self.map_rows(run, ROWS)(params, frozen, (batch, row_keys), score)


def default_chunk(rows: int, seq_len: int, vocab_size: int) -> int:
    """Return the positions per row that keep about 2^25 logits alive, in equal chunks of the row.

    Args:
      rows: rows of a microbatch on one device; vocab_size: columns of the head on one device.
    """
    most = max(1, _LOGITS_AT_ONCE // (rows * vocab_size))
    num_chunks = -(-seq_len // most)
    return -(-seq_len // num_chunks)
