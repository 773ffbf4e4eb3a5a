"""Direct preference optimisation: a policy learns from pairs of answers, without a reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.config.alignment import DPOConfig
from jaxllm.losses.dpo import dpo_loss, implicit_rewards
from jaxllm.train.flops import model_flops_per_token
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.base import Sums
from jaxllm.train.objectives.pairs import (
    abstract_pairs,
    answer_sums,
    pair_totals,
    pairs_in_row,
    preference_metrics,
    preference_parts,
)
from jaxllm.train.objectives.policies import PolicyObjective
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.objectives.trees import part
from jaxllm.types import Batch, Params, PreferenceBatch

_MEANS = ("sigmoid_norm", "ipo")
"""Variants of means over tokens; the others take sums."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectPreference(PolicyObjective):
    """A loss of log-probabilities of two answers, relative to those of a reference, as a mean over pairs.

    Attributes:
      reference: None: batches hold its log-probabilities, or there is none.
      pairs_per_row: pairs that a row has room for.
    """

    options: DPOConfig
    pairs_per_row: int

    @classmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> DirectPreference:
        """Build the objective of the stage dpo."""
        options = config.dpo
        live = options.reference == "live"
        reference = Reference.create(forward, config.adapter, options.reference_weights) if live else None
        return cls(forward=forward, options=options, reference=reference, pairs_per_row=pairs_in_row(config))

    def flops_per_token(self, seq_len: int) -> float:
        """Return what the policy costs, and the forward pass of the reference."""
        reference = 0.0 if self.reference is None else model_flops_per_token(self.forward.spec, seq_len) / 3
        return super().flops_per_token(seq_len) + reference

    def abstract_batch(self, rows: Batch, array: Callable) -> PreferenceBatch:
        """Return rows of pairs."""
        precomputed = self.options.reference == "precomputed"
        return abstract_pairs(rows, array, self.pairs_per_row, with_reference=precomputed)

    def totals(self, batch: PreferenceBatch) -> Sums:
        """Return the pairs, and the tokens of chosen answers."""
        return pair_totals(batch)

    def loss_sums(
        self,
        params: Params,
        frozen: Params | None,
        batch: PreferenceBatch,
        totals: Sums,
        *,
        train: bool,
        step: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Sums]:
        """Return the sum of the training loss over pairs, and sums of its parts and of what log-probabilities say."""
        base = part(frozen, "policy")
        logps = self.forward.token_logps(params, base, batch.rows, train=train, row_keys=row_keys)
        reference = batch.ref_logps
        if self.reference is not None:
            fixed, own = jax.lax.stop_gradient(params), part(frozen, "reference")
            reference = answer_sums(self.reference.token_logps(fixed, base, own, batch.rows), batch)
        return self.sums_of(answer_sums(logps, batch), reference, batch, totals, by_level=step is None)

    def sums_of(
        self,
        policy: jax.Array,
        reference: jax.Array | None,
        batch: PreferenceBatch,
        totals: Sums,
        *,
        by_level: bool = False,
    ) -> tuple[jax.Array, Sums]:
        """Return what `loss_sums` does, from the log-probabilities of answers, [B, K, 2] each.

        Args:
          reference: None: it is taken to be uniform.
        """
        options, weights = self.options, batch.pair_weights
        free = reference is None
        reference = jnp.zeros_like(policy) if free else reference
        lengths = jnp.maximum(answer_sums((batch.rows.loss_weights != 0).astype(policy.dtype), batch), 1)
        scale = 1 / lengths if options.variant in _MEANS else jnp.ones_like(lengths)
        losses = dpo_loss(
            *(side for sums in (policy * scale, reference * scale) for side in (sums[..., 0], sums[..., 1])),
            beta=options.beta,
            variant=options.variant,
            label_smoothing=options.label_smoothing,
            reference_free=free,
        )
        parts = {"dpo": jnp.sum(weights * losses), "chosen_loss": -jnp.sum(weights * policy[..., 0])}
        loss = parts["dpo"]
        if options.sft_weight:
            # A mean over tokens beside means over pairs, which the step divides all by pairs.
            loss += options.sft_weight * parts["chosen_loss"] * totals["weight"] / totals["chosen_tokens"]
        parts |= preference_parts(implicit_rewards(policy, reference, beta=options.beta), batch, by_level=by_level)
        parts["rejected_logps"] = jnp.sum(weights * policy[..., 1])
        if not free:
            parts["distance"] = jnp.sum(weights * jnp.mean(jnp.abs(policy - reference), axis=-1))
        return loss, parts

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return loss, of a pair, what the policy's rewards say, and log-probabilities of answers in nats.

        reference_distance is how far those of the reference are from the policy's, 0 where both are the same.
        """
        weight = totals["weight"]
        metrics = {"loss": parts["dpo"] / weight} | preference_metrics(parts, totals)
        metrics |= {"chosen_logps": -parts["chosen_loss"] / weight, "rejected_logps": parts["rejected_logps"] / weight}
        if "distance" in parts:
            metrics["reference_distance"] = parts["distance"] / weight
        if self.options.sft_weight:
            metrics["sft_loss"] = parts["chosen_loss"] / totals["chosen_tokens"]
        return metrics
