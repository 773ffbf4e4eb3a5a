"""What a training step minimises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.losses.lm import chunked_loss_sums
from jaxllm.nn.decoder import Remat, head_kernel
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.types import Batch, Params

_LOGITS_AT_ONCE = 2**25


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """Next-token prediction.

    Attributes:
      compute_dtype: dtype of activations.
      remat: what the backward pass recomputes.
      z_loss, max_z_loss: weights of the two z-losses.
      chunk: positions of each row whose logits exist at once.
    """

    spec: ModelSpec
    compute_dtype: jnp.dtype
    remat: Remat
    chunk: int
    z_loss: float = 0.0
    max_z_loss: float = 0.0

    def loss_sums(self, params: Params, batch: Batch, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Return (sum of the training loss, sum of the cross-entropy in nats) over the weighted positions.

        Only the first is differentiable. Sums, not means, so that gradient accumulation stays exact.
        """
        hidden = apply(
            self.spec,
            params,
            batch,
            train=train,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            return_logits=False,
        ).hidden
        return chunked_loss_sums(
            hidden,
            head_kernel(self.spec, params),
            batch.targets,
            batch.loss_weights,
            chunk=self.chunk,
            z_loss_weight=self.z_loss,
            max_z_loss_weight=self.max_z_loss,
        )


def default_chunk(rows: int, seq_len: int, vocab_size: int) -> int:
    """Return the positions per row that keep about 2^25 logits alive, in equal chunks of the row.

    Args:
      rows: rows of a microbatch on one device; vocab_size: columns of the head on one device.
    """
    most = max(1, _LOGITS_AT_ONCE // (rows * vocab_size))
    num_chunks = -(-seq_len // most)
    return -(-seq_len // num_chunks)
