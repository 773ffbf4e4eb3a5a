"""Held-out evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxllm.data.blank_rows import BlankInfilling
from jaxllm.data.loader import heldout_batches
from jaxllm.data.shards import ShardSet
from jaxllm.sharding.processes import AgreedError
from jaxllm.train.setup import Setup
from jaxllm.train.signals import Votes
from jaxllm.train.step import make_eval_step
from jaxllm.types import Params, TrainState


class HeldoutLoss:
    """The objective's metrics over all held-out rows, each seen once."""

    def __init__(self, setup: Setup, shard_sets: Sequence[ShardSet]):
        self._setup, self._shard_sets = setup, shard_sets
        self._eval_step = make_eval_step(setup.objective)

    def __call__(self, state: TrainState, frozen: Params | None, votes: Votes) -> dict[str, float] | None:
        """Return the metrics; None if a signal cut it short.

        Position rules are those of training, since rows are packed.

        Returns:
          what the objective records; for cross-entropy loss (nats per predicted token, the end of each document
          included), perplexity, tokens (predicted) and, of documents, bits_per_byte (of their UTF-8 text; not where
          only blanks are predicted).

        Raises:
          InputError: no document has room for a blank.
        """
        setup = self._setup
        sums = None
        batches = heldout_batches(
            self._shard_sets,
            seq_len=setup.config.data.seq_len,
            packing=setup.packing,
            batch_size=setup.eval_batch_size,
            start_id=setup.start_id,
            eos_id=setup.eos_id,
        )
        for rows in batches:
            *batch_sums, largest = self._eval_step(
                state.params, setup.feed.whole_to_devices(rows), votes.cast(), frozen
            )
            batch_sums = jax.tree.map(lambda array: np.asarray(array, np.float64), batch_sums)
            sums = batch_sums if sums is None else jax.tree.map(np.add, sums, batch_sums)
            votes.count(largest)
            if votes.stopping:
                return None
        if sums is None or not sums[1]["weight"]:
            raise AgreedError("data.heldout: nothing to predict: the documents are too short for blanks")
        metrics = {name: float(value) for name, value in setup.objective.metrics(*sums).items()}
        tokens = metrics.pop("trained_tokens", None)
        return metrics | self._of_text(*sums) | ({} if tokens is None else {"tokens": int(tokens)})

    def _of_text(self, parts: dict[str, np.ndarray], totals: dict[str, np.ndarray]) -> dict[str, float]:
        """Return what cross-entropy means in other units."""
        if "entropy" not in parts:
            return {}
        nats, tokens = float(parts["entropy"]), float(totals["weight"])
        result = {"perplexity": math.exp(min(nats / tokens, 700.0))}
        if self._setup.config.stage == "pretrain" and not isinstance(self._setup.packing, BlankInfilling):
            num_bytes = sum(shards.num_bytes for shards in self._shard_sets)
            result["bits_per_byte"] = nats / math.log(2) / num_bytes
        return result
