"""Cross-entropy of given targets: pretraining and supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.config import EmbeddingShrinkConfig, RunConfig
from jaxllm.losses.lm import chunked_loss_sums
from jaxllm.nn.decoder import head_kernel
from jaxllm.nn.moe import RoutingStatistics
from jaxllm.sharding.rules import ROWS
from jaxllm.spec import ModelSpec
from jaxllm.train.balance import balance_losses
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.base import Objective, Sums, Weights, place
from jaxllm.train.schedule import embedding_gradient_scale
from jaxllm.types import Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling(Objective):
    """Cross-entropy of given targets: next tokens, or what belongs into blanks.

    Attributes:
      forward: the model, with the balance losses and the capacity of its mixture of experts that the run wants.
      z_loss, max_z_loss: weights of the two z-losses.
      embedding_shrink: how much of its gradient reaches the token embedding, in both uses of a tied one.
      never_dropped: share of rows that no capacity of experts touches.
    """

    z_loss: float = 0.0
    max_z_loss: float = 0.0
    embedding_shrink: EmbeddingShrinkConfig | None = None
    never_dropped: float = 0.0

    @classmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> LanguageModeling:
        """Build the objective of the stages pretrain and sft."""
        train = config.train
        return cls(
            forward=forward,
            z_loss=train.z_loss,
            max_z_loss=forward.spec.head.max_z_loss if train.max_z_loss is None else train.max_z_loss,
            embedding_shrink=train.embedding_gradient_shrink,
            never_dropped=0.0 if train.moe is None else train.moe.never_dropped,
        )

    @property
    def draws(self) -> bool:
        """Whether the loss is random."""
        return bool(self.never_dropped) or super().draws

    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return the weights to start from, split as the tuning does."""
        return place(self.forward.tuning, fresh, weights.model(), weights.adapter(self.forward.tuning))

    def abstract_batch(self, rows: Batch, array: Callable) -> Batch:
        """Return the rows: there is nothing else in a batch."""
        del array
        return rows

    def totals(self, batch: Batch) -> Sums:
        """Return the weighted positions."""
        return {"weight": jnp.sum(batch.loss_weights)}

    def loss_sums(
        self,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        totals: Sums,
        *,
        train: bool,
        step: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Sums]:
        """Return the sum of the training loss over the weighted positions, and sums of its parts.

        The parts: entropy, the cross-entropy in nats; for mixtures of experts in training also balance, the balance
        losses, and load [mixture layers, experts], how many tokens selected each expert. The balance losses of a
        mixture are means by nature: they count once for each weighted position, so that each microbatch has the share
        of its positions. Balanced "as a whole", and within the experts' capacity, is a microbatch.
        """
        del totals

        def run(params: Params, frozen: Params | None, rows: Any, step: jax.Array | None):
            return self._local_sums(params, frozen, rows, step, train=train)

        out_specs = (ROWS, ROWS, PartitionSpec(None, *ROWS))
        rows = (batch, row_keys)
        losses, entropies, statistics = self.forward.map_rows(run, out_specs)(params, frozen, rows, step)
        loss, parts = jnp.sum(losses), {"entropy": jnp.sum(entropies)}
        if statistics is not None:
            balance = balance_losses(self.forward.spec.moe, statistics) * jnp.sum(batch.loss_weights)
            loss += balance
            parts |= {"balance": balance, "load": jnp.sum(statistics.load, axis=1)}
        return loss, parts

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return loss (nats per token) and trained_tokens, and for mixtures balance_loss and max_expert_load.

        The latter is the load of the busiest expert in any layer, over the mean.
        """
        metrics = {"loss": parts["entropy"] / totals["weight"], "trained_tokens": totals["weight"]}
        if "load" in parts:
            load = parts["load"]
            metrics["balance_loss"] = parts["balance"] / totals["weight"]
            metrics["max_expert_load"] = jnp.max(load / jnp.mean(load, axis=-1, keepdims=True))
        return metrics

    def _local_sums(
        self,
        params: Params,
        frozen: Params | None,
        rows: tuple[Batch, jax.Array | None],
        step: jax.Array | None,
        *,
        train: bool,
    ) -> tuple[jax.Array, jax.Array, RoutingStatistics | None]:
        """Return the sums [1] of loss and cross-entropy over some rows, and the statistics of their routing."""
        batch, row_keys = rows
        spec = self.forward.spec if step is not None else _keeping_all(self.forward.spec)
        options = {}
        scale = None
        if self.embedding_shrink is not None and step is not None:
            scale = embedding_gradient_scale(step, **dataclasses.asdict(self.embedding_shrink))
            options["embedding_gradient_scale"] = scale
        if self.never_dropped and row_keys is not None:
            options["never_dropped"] = draw_rows(row_keys, self.never_dropped)
        output, model, adapter = self.forward.output(
            params, frozen, batch, train=train, row_keys=row_keys, spec=spec, **options
        )
        kernel = head_kernel(self.forward.spec, model, output.hidden.dtype, adapter)
        if scale is not None and self.forward.spec.head.tie_word_embeddings:
            # The gradient of a tied matrix is scaled in both of its uses.
            fixed = jax.lax.stop_gradient(kernel)
            kernel = fixed + scale.astype(kernel.dtype) * (kernel - fixed)
        loss, entropy = chunked_loss_sums(
            output.hidden,
            kernel,
            batch.targets,
            batch.loss_weights,
            chunk=self.forward.chunk,
            z_loss_weight=self.z_loss,
            max_z_loss_weight=self.max_z_loss,
        )
        unbalanced = spec.moe is None or step is None
        return loss[None], entropy[None], None if unbalanced else output.aux.statistics


def draw_rows(row_keys: jax.Array, share: float) -> jax.Array:
    """Draw True for a share of the rows, bool [B], each by its own key (uint32 [B, 2])."""
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), share))(row_keys)


def _keeping_all(spec: ModelSpec) -> ModelSpec:
    """Return the spec without a capacity of experts."""
    if spec.moe is None:
        return spec
    return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, capacity_factor=None))
