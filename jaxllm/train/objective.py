"""What a training step minimises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.config import EmbeddingShrinkConfig
from jaxllm.losses.lm import chunked_loss_sums
from jaxllm.nn.decoder import Remat, head_kernel
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.train.schedule import embedding_gradient_scale
from jaxllm.types import Batch, Params

_LOGITS_AT_ONCE = 2**25


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """Cross-entropy of given targets: next tokens, or what belongs into blanks.

    Attributes:
      compute_dtype: dtype of activations.
      remat: what the backward pass recomputes.
      z_loss, max_z_loss: weights of the two z-losses.
      chunk: positions of each row whose logits exist at once.
      embedding_shrink: how much of its gradient reaches the token embedding, in both uses of a tied one.
    """

    spec: ModelSpec
    compute_dtype: jnp.dtype
    remat: Remat
    chunk: int
    z_loss: float = 0.0
    max_z_loss: float = 0.0
    embedding_shrink: EmbeddingShrinkConfig | None = None

    def loss_sums(
        self, params: Params, batch: Batch, *, train: bool, step: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return (sum of the training loss, sum of the cross-entropy in nats) over the weighted positions.

        Only the first is differentiable. Sums, not means, so that gradient accumulation stays exact.

        Args:
          step: int [], finished updates; only needed for gradients.
        """
        scale, kernel = None, head_kernel(self.spec, params)
        if self.embedding_shrink is not None and step is not None:
            scale = embedding_gradient_scale(step, **dataclasses.asdict(self.embedding_shrink))
            if self.spec.head.tie_word_embeddings:
                fixed = jax.lax.stop_gradient(kernel)
                kernel = fixed + scale * (kernel - fixed)
        hidden = apply(
            self.spec,
            params,
            batch,
            train=train,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            return_logits=False,
            embedding_gradient_scale=scale,
        ).hidden
        return chunked_loss_sums(
            hidden,
            kernel,
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
