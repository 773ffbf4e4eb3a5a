"""Group relative policy optimisation: what answers to the same prompt teach a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.config.alignment import GRPOConfig
from jaxllm.losses.grpo import grpo_terms, grpo_weights, k3_kl
from jaxllm.losses.masked import masked
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.advantages import Judged, Measured, group_batch
from jaxllm.train.objectives.base import Sums
from jaxllm.train.objectives.policies import SampledObjective
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.objectives.trees import part
from jaxllm.types import Batch, Params, RolloutBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPolicy(SampledObjective):
    """Stage grpo: answers are better or worse than others to the same prompt (arXiv:2402.03300).

    Attributes:
      reference: what the KL divergence is from; None: there is none, or it moves and lies in the state.
      samples: answers to each prompt, in rows after each other. max_length: tokens of the longest answer.
      one_update: a round has a single update, in which the policy still is the one that sampled.
    """

    config: GRPOConfig
    samples: int
    max_length: int
    one_update: bool = False

    @classmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> GroupPolicy:
        """Build the objective of the stage grpo."""
        rollout = config.rollout
        fixed = config.grpo.kl_coef > 0 and config.grpo.reference_every is None
        return cls(
            forward=forward,
            config=config.grpo,
            reference=Reference.create(forward, config.adapter, rollout.reference_weights) if fixed else None,
            temperature=rollout.temperature,
            samples=rollout.samples,
            max_length=rollout.max_new_tokens,
            one_update=rollout.epochs * rollout.prompts * rollout.samples == config.train.batch_size,
        )

    @property
    def is_measured_in_update(self) -> bool:
        """Whether log-probabilities before the update are those in it, so that its ratios are 1 and nothing clips."""
        return self.one_update and not self.draws

    @property
    def moves_reference(self) -> bool:
        """Whether the reference is the policy of some rounds ago."""
        return self.config.kl_coef > 0 and self.config.reference_every is not None

    def abstract_batch(self, rows: Batch, array: Callable) -> RolloutBatch:
        """Return rows with what is known of each token."""
        values = array(rows.tokens.shape, jnp.float32)
        return RolloutBatch(
            rows=rows, old_logps=values, advantages=values, ref_logps=values if self.config.kl_coef else None
        )

    def judge(self, rows: Batch, measured: Measured, judged: Judged) -> RolloutBatch:
        """Return the rows of a round with their advantages."""
        return group_batch(rows, measured, judged, samples=self.samples, config=self.config)

    def totals(self, batch: RolloutBatch) -> Sums:
        """Return what the loss is a mean over, the tokens of answers, and the answers that have any."""
        mask = batch.rows.loss_weights
        _, denominators = self._weights(mask)
        # Answers of groups that were dropped do not count; where no group is left, the loss is 0.
        counted = denominators * jnp.any(mask != 0, axis=-1)
        return {
            "weight": jnp.maximum(jnp.sum(counted), 1),
            "tokens": jnp.maximum(jnp.sum(mask != 0), 1),
            "answers": jnp.maximum(jnp.sum(jnp.any(mask != 0, axis=-1)), 1),
        }

    def loss_sums(
        self,
        params: Params,
        frozen: Params | None,
        batch: RolloutBatch,
        totals: Sums,
        *,
        train: bool,
        step: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Sums]:
        """Return the sum of the weighted losses of all tokens.

        The parts: loss, policy (without the KL divergence), clipped (tokens whose ratio the clipping holds) and moved
        (k3 of the divergence from the policy that sampled, over tokens). Where the update is what measures them also
        largest_gap, how far sampled log-probabilities are from those of the training forward pass, and kl, k3 of the
        divergence from the reference.
        """
        del totals, step
        config, mask = self.config, batch.rows.loss_weights
        logps = self.forward.token_logps(
            params, part(frozen, "policy"), batch.rows, train=train, row_keys=row_keys, temperature=self.temperature
        )
        old_logps = jax.lax.stop_gradient(logps) if self.is_measured_in_update else batch.old_logps
        terms = grpo_terms(
            logps,
            old_logps,
            batch.ref_logps,
            batch.advantages,
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_low if config.clip_high is None else config.clip_high,
            kl_coef=config.kl_coef,
            ratio=config.ratio,
        )
        weights, _ = self._weights(mask)
        loss = jnp.sum(weights * terms.losses)
        parts = {
            "loss": loss,
            "policy": loss - config.kl_coef * jnp.sum(weights * terms.kl),
            "clipped": jnp.sum(terms.clipped_low | terms.clipped_high),
            "moved": jnp.sum(masked(k3_kl(logps, old_logps), mask)),
        }
        if self.is_measured_in_update:
            parts["largest_gap"] = jnp.max(jnp.abs(masked(old_logps - batch.old_logps, mask)))
            if batch.ref_logps is not None:
                parts["kl"] = jnp.sum(masked(k3_kl(old_logps, batch.ref_logps), mask))
        return loss, parts

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return loss, policy_loss, clipped (share of tokens), approx_kl (from the policy that sampled, nats), and
        where the update measures them logp_gap and kl (from the reference, nats per answer)."""
        measured = {"logp_gap": parts["largest_gap"]} if self.is_measured_in_update else {}
        if "kl" in parts:
            measured["kl"] = parts["kl"] / totals["answers"]
        return measured | {
            "loss": parts["loss"] / totals["weight"],
            "policy_loss": parts["policy"] / totals["weight"],
            "clipped": parts["clipped"] / totals["tokens"],
            "approx_kl": parts["moved"] / totals["tokens"],
        }

    def _weights(self, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return grpo_weights(mask, reduction=self.config.reduction, max_length=self.max_length)
