"""Group relative policy optimisation: what answers to the same prompt teach a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.config.alignment import GRPOConfig
from jaxllm.losses.grpo import grpo_terms, grpo_weights, k3_kl
from jaxllm.losses.masked import masked
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.advantages import Judged, Measured, group_batch
from jaxllm.train.objectives.base import Sums, Weights, place
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.objectives.trees import part, present
from jaxllm.types import Batch, Params, RolloutBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPolicy:
    """Stage grpo: answers are better or worse than others to the same prompt (arXiv:2402.03300).

    What is trained is the policy. Frozen lie {"policy": what its tuning leaves as it is, "reference": whole weights},
    as far as there are any.

    Attributes:
      reference: what the KL divergence is from; None: there is none, or it moves and lies in the state.
      temperature: answers were sampled at, and log-probabilities are taken at.
      samples: answers to each prompt, in rows after each other. max_length: tokens of the longest answer.
    """

    forward: Forward
    config: GRPOConfig
    reference: Reference | None
    temperature: float
    samples: int
    max_length: int

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
        )

    @property
    def draws(self) -> bool:
        """Whether the loss is random."""
        return self.forward.draws

    @property
    def moves_reference(self) -> bool:
        """Whether the reference is the policy of some rounds ago."""
        return self.config.kl_coef > 0 and self.config.reference_every is not None

    def declarations(self) -> Any:
        """Return what the tuning trains."""
        return self.forward.tuning.trained()

    def frozen_declarations(self) -> Any | None:
        """Return what is frozen of the policy, and the reference."""
        return present(
            policy=self.forward.tuning.frozen(),
            reference=None if self.reference is None else self.reference.declarations(),
        )

    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return the weights to start from, split as the tuning does, with those of the reference."""
        own = None if self.reference is None else self.reference.place(weights)
        trained, frozen = place(self.forward.tuning, fresh, weights.model(), weights.adapter(self.forward.tuning))
        return trained, present(policy=frozen, reference=own)

    def learning_rates(self, rate: jax.Array, step: jax.Array) -> jax.Array:
        """Return the one learning rate."""
        del step
        return rate

    def abstract_batch(self, rows: Batch, array: Callable) -> RolloutBatch:
        """Return rows with what is known of each token."""
        values = array(rows.tokens.shape, jnp.float32)
        return RolloutBatch(
            rows=rows, old_logps=values, advantages=values, ref_logps=values if self.config.kl_coef else None
        )

    def policy(self, params: Params, frozen: Params | None) -> tuple[Params, Any]:
        """Return (parameters, adapter) of the policy, to sample with."""
        return self.forward.tuning.join(params, part(frozen, "policy"))

    def measure(self, rows: Batch, params: Params, moving: Params | None, frozen: Params | None) -> Measured:
        """Return what policy and reference say of sampled answers, before the updates of a round.

        Args:
          moving: the reference that lies in the state, if one does.
        """
        base = part(frozen, "policy")
        options = dict(train=True, temperature=self.temperature)
        ref_logps = None
        if self.reference is not None:
            own = part(frozen, "reference")
            ref_logps = self.reference.token_logps(params, base, own, rows, temperature=self.temperature)
        elif moving is not None:
            ref_logps = self.forward.token_logps(moving, base, rows, **options)
        return Measured(self.forward.token_logps(params, base, rows, **options), ref_logps)

    def judge(self, rows: Batch, measured: Measured, judged: Judged) -> RolloutBatch:
        """Return the rows of a round with their advantages."""
        return group_batch(rows, measured, judged, samples=self.samples, config=self.config)

    def totals(self, batch: RolloutBatch) -> Sums:
        """Return what the loss is a mean over, and the tokens of answers."""
        mask = batch.rows.loss_weights
        _, denominators = self._weights(mask)
        # Answers of groups that were dropped do not count; where no group is left, the loss is 0.
        counted = denominators * jnp.any(mask != 0, axis=-1)
        return {"weight": jnp.maximum(jnp.sum(counted), 1), "tokens": jnp.maximum(jnp.sum(mask != 0), 1)}

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
        (k3 of the divergence from the policy that sampled, over tokens).
        """
        del totals, step
        config, mask = self.config, batch.rows.loss_weights
        logps = self.forward.token_logps(
            params, part(frozen, "policy"), batch.rows, train=train, row_keys=row_keys, temperature=self.temperature
        )
        terms = grpo_terms(
            logps,
            batch.old_logps,
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
            "moved": jnp.sum(masked(k3_kl(logps, batch.old_logps), mask)),
        }
        return loss, parts

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return loss, policy_loss, clipped (share of tokens) and approx_kl (from the policy that sampled, nats)."""
        return {
            "loss": parts["loss"] / totals["weight"],
            "policy_loss": parts["policy"] / totals["weight"],
            "clipped": parts["clipped"] / totals["tokens"],
            "approx_kl": parts["moved"] / totals["tokens"],
        }

    def _weights(self, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return grpo_weights(mask, reduction=self.config.reduction, max_length=self.max_length)
