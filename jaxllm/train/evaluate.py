"""Held-out evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxllm.data.blank_rows import BlankInfilling
from jaxllm.data.loader import heldout_batches
from jaxllm.data.shards import ShardSet
from jaxllm.sharding.processes import AgreedError
from jaxllm.train.setup import Setup
from jaxllm.train.signals import Votes
from jaxllm.train.step import EvalStep
from jaxllm.types import Params


def evaluate(
    setup: Setup, eval_step: EvalStep, params: Params, shard_sets: Sequence[ShardSet], votes: Votes
) -> dict[str, float] | None:
    """Return the loss over all held-out documents, each seen once; None if a signal cut it short.

    Position rules are those of training, since rows are packed.

    Returns:
      loss (nats per predicted token, the end of each document included), perplexity, bits_per_byte (of the documents'
      UTF-8 text; not where only blanks are predicted) and tokens (predicted).

    Raises:
      InputError: no document has room for a blank.
    """
    nats = tokens = 0.0
    batches = heldout_batches(
        shard_sets,
        seq_len=setup.config.data.seq_len,
        packing=setup.packing,
        batch_size=setup.eval_batch_size,
        start_id=setup.start_id,
        eos_id=setup.eos_id,
    )
    for rows in batches:
        batch_nats, batch_tokens, largest = eval_step(params, setup.feed.whole_to_devices(rows), votes.cast())
        nats += float(batch_nats)
        tokens += float(batch_tokens)
        votes.count(largest)
        if votes.stopping:
            return None
    if not tokens:
        raise AgreedError("data.heldout: the documents are too short for blanks")
    loss = nats / tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if not isinstance(setup.packing, BlankInfilling):
        num_bytes = sum(shards.num_bytes for shards in shard_sets)
        result["bits_per_byte"] = nats / math.log(2) / num_bytes
    return result | {"tokens": int(tokens)}
