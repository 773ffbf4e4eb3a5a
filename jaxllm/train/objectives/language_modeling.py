"""What a training step minimises."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.config import EmbeddingShrinkConfig
from jaxllm.losses.lm import chunked_loss_sums
from jaxllm.nn.decoder import Remat, head_kernel
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply, param_specs
from jaxllm.nn.moe import RoutingStatistics
from jaxllm.sharding.rules import RULES, constrain
from jaxllm.sharding.staged import by_rows
from jaxllm.spec import ModelSpec
from jaxllm.train.balance import balance_losses
from jaxllm.train.schedule import embedding_gradient_scale
from jaxllm.types import Batch, Params

_LOGITS_AT_ONCE = 2**25
_ROWS = RULES.spec(("batch",))


class LossParts(NamedTuple):
    """What is told of a loss beside its value, as sums over microbatches.

    Attributes:
      entropy: sum of the cross-entropy in nats over the weighted positions.
      balance: sum of the balance losses over the weighted positions; None without a mixture of experts.
      load: float [mixture layers, experts], how many tokens selected each expert; None without a mixture.
    """

    entropy: jax.Array
    balance: jax.Array | None = None
    load: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """Cross-entropy of given targets: next tokens, or what belongs into blanks.

    Attributes:
      spec: with the balance losses and the capacity of its mixture of experts that the run wants.
      compute_dtype: dtype of activations.
      remat: what the backward pass recomputes.
      z_loss, max_z_loss: weights of the two z-losses.
      chunk: positions of each row whose logits exist at once.
      embedding_shrink: how much of its gradient reaches the token embedding, in both uses of a tied one.
      never_dropped: share of rows that no capacity of experts touches.
      attention_impl: what computes attention, see `nn.model.apply`.
      staged: weights are gathered by hand, see `jaxllm.sharding.staged`; False: as XLA partitions.
    """

    spec: ModelSpec
    compute_dtype: jnp.dtype
    remat: Remat
    chunk: int
    z_loss: float = 0.0
    max_z_loss: float = 0.0
    embedding_shrink: EmbeddingShrinkConfig | None = None
    never_dropped: float = 0.0
    attention_impl: AttentionImpl | None = None
    staged: bool = False

    def draw_never_dropped(self, key: jax.Array, num_rows: int) -> jax.Array | None:
        """Draw the rows of a global batch whose tokens keep all their experts: bool [B], None where none may."""
        if not self.never_dropped:
            return None
        return constrain(jax.random.bernoulli(key, self.never_dropped, (num_rows,)), "batch")

    def loss_sums(
        self,
        params: Params,
        batch: Batch,
        *,
        train: bool,
        step: jax.Array | None = None,
        never_dropped: jax.Array | None = None,
    ) -> tuple[jax.Array, LossParts]:
        """Return (sum of the training loss over the weighted positions, its parts).

        Only the first is differentiable. Sums, not means, so that gradient accumulation stays exact. The balance
        losses of a mixture are means by nature: they count once for each weighted position, so that each microbatch
        has the share of its positions. Balanced "as a whole", and within the experts' capacity, is a microbatch.

        Args:
          step: int [], finished updates; None: an evaluation, without gradients, balance losses and dropping.
          never_dropped: bool [B], see `draw_never_dropped`.
        """
        run = functools.partial(self._local_sums, train=train)
        if self.staged:
            run = by_rows(run, param_specs(self.spec), (_ROWS, _ROWS, PartitionSpec(None, *_ROWS)))
        losses, entropies, statistics = run(params, (batch, never_dropped), step)
        loss, entropy = jnp.sum(losses), jnp.sum(entropies)
        if statistics is None:
            return loss, LossParts(entropy)
        balance = balance_losses(self.spec.moe, statistics) * jnp.sum(batch.loss_weights)
        return loss + balance, LossParts(entropy, balance, jnp.sum(statistics.load, axis=1))

    def _local_sums(
        self, params: Params, rows: tuple[Batch, jax.Array | None], step: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, jax.Array, RoutingStatistics | None]:
        """Return the sums [1] of loss and cross-entropy over some rows, and the statistics of their routing."""
        batch, never_dropped = rows
        spec = self.spec if step is not None else _keeping_all(self.spec)
        scale = None
        if self.embedding_shrink is not None and step is not None:
            scale = embedding_gradient_scale(step, **dataclasses.asdict(self.embedding_shrink))
        output = apply(
            spec,
            params,
            batch,
            train=train,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            attention_impl=self.attention_impl,
            return_logits=False,
            embedding_gradient_scale=scale,
            never_dropped=never_dropped,
        )
        loss, entropy = chunked_loss_sums(
            output.hidden,
            self._head_kernel(params, scale, output.hidden.dtype),
            batch.targets,
            batch.loss_weights,
            chunk=self.chunk,
            z_loss_weight=self.z_loss,
            max_z_loss_weight=self.max_z_loss,
        )
        unbalanced = spec.moe is None or step is None
        return loss[None], entropy[None], None if unbalanced else output.aux.statistics

    def _head_kernel(self, params: Params, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        """Return the output matrix; a tied one's gradient is scaled as that of the lookup is."""
        kernel = head_kernel(self.spec, params, dtype)
        if scale is None or not self.spec.head.tie_word_embeddings:
            return kernel
        fixed = jax.lax.stop_gradient(kernel)
        return fixed + scale.astype(kernel.dtype) * (kernel - fixed)


def _keeping_all(spec: ModelSpec) -> ModelSpec:
    """Return the spec without a capacity of experts."""
    if spec.moe is None:
        return spec
    return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, capacity_factor=None))


def default_chunk(rows: int, seq_len: int, vocab_size: int) -> int:
    """Return the positions per row that keep about 2^25 logits alive, in equal chunks of the row.

    Args:
      rows: rows of a microbatch on one device; vocab_size: columns of the head on one device.
    """
    most = max(1, _LOGITS_AT_ONCE // (rows * vocab_size))
    num_chunks = -(-seq_len // most)
    return -(-seq_len // num_chunks)
