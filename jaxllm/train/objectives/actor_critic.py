"""Proximal policy optimisation: a policy, and a value model that expects what its answers will be worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.config.alignment import PPOConfig
from jaxllm.errors import InputError
from jaxllm.losses.grpo import k3_kl
from jaxllm.losses.masked import masked
from jaxllm.losses.ppo import policy_terms, value_terms
from jaxllm.nn import score
from jaxllm.nn.model import abstract_params
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.advantages import Judged, Measured, actor_critic_batch
from jaxllm.train.objectives.base import Sums, Weights, place
from jaxllm.train.objectives.policies import SampledObjective
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.objectives.trees import part, present
from jaxllm.train.tuning.cost import tuned_flops_per_token
from jaxllm.train.tuning.headless import Headless, without_head
from jaxllm.types import Batch, Params, RolloutBatch

_TEXT_FIELDS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "loss_weights": jnp.float32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorCritic(SampledObjective):
    """Stage ppo (arXiv:1707.06347), with a value model of the policy's architecture.

    Trained are {"policy", "critic": {"model", "score"}}. Frozen lie, as far as there are any, {"policy", "critic":
    what their tuning leaves as it is, "reference": whole weights}.

    Attributes:
      critic: the value model without its score.
      reference: what the reward's KL divergence is from; None: there is none.
      critic_rate: learning rate of the value model over that of the policy.
    """

    critic: Forward
    config: PPOConfig
    critic_rate: float

    clips_entries: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> ActorCritic:
        """Build the objective of the stage ppo."""
        ppo, rate = config.ppo, config.optimizer.learning_rate
        if ppo.pretrain_weight and forward.spec.mask == "prefix":
            raise InputError(
                f"ppo.pretrain_weight: found {ppo.pretrain_weight}, but model {config.model.label} has no positions "
                "for texts without a prompt; expected 0"
            )
        has_divergence = ppo.kl_coef > 0 or bool(ppo.kl_coef_end)
        return cls(
            forward=forward,
            critic=dataclasses.replace(forward, tuning=Headless(forward.tuning)),
            config=ppo,
            reference=(
                Reference.create(forward, config.adapter, config.rollout.reference_weights) if has_divergence else None
            ),
            temperature=config.rollout.temperature,
            critic_rate=1.0 if ppo.critic_learning_rate is None else ppo.critic_learning_rate / rate,
        )

    def declarations(self) -> Any:
        """Return what is trained of the policy, and of the value model with its score."""
        value_model = {"model": self.critic.tuning.trained(), "score": score.declarations(self.critic.spec)}
        return {"policy": self.forward.tuning.trained(), "critic": value_model}

    def frozen_declarations(self) -> Any | None:
        """Return what is frozen of both, and the reference."""
        return present(**(super().frozen_declarations() or {}), critic=self.critic.tuning.frozen())

    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return the weights to start from; those of the value model are a reward model's, or the policy's."""
        start = weights.model()
        policy, frozen = self.place_policy(lambda: fresh()["policy"], weights, start)
        if self.config.critic is None:
            found = {} if start is None else {"model": without_head(start)}
        else:
            found = self._found_critic(weights)
        model, beside = place(self.critic.tuning, lambda: fresh()["critic"]["model"], found.get("model"))
        # Not the policy's buffers: the step gives both up.
        value_model = {"model": jax.tree.map(jnp.copy, model), "score": found.get("score", fresh()["critic"]["score"])}
        return {"policy": policy, "critic": value_model}, present(**(frozen or {}), critic=beside)

    def flops_per_token(self, seq_len: int) -> float:
        """Return what policy and value model cost; texts that are mixed in are not counted."""
        return super().flops_per_token(seq_len) + tuned_flops_per_token(self.critic.tuning, seq_len)

    def _found_critic(self, weights: Weights) -> Params:
        """Return {"model", "score"} of the reward model that the value model starts from."""
        path = self.config.critic
        found = weights.reward_model(path)
        model, expected = without_head(found["model"]), without_head(abstract_params(self.critic.spec))
        if jax.tree.map(jnp.shape, model) != jax.tree.map(jnp.shape, expected):
            raise InputError(f"ppo.critic: {path} is another model than the policy; expected one of the same size")
        return {"model": model, "score": found["score"]}

    def learning_rates(self, rate: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """Return the rates of policy and value model; that of the policy is 0 while the value model warms up."""
        return {"policy": jnp.where(step < self.config.critic_warmup, 0, rate), "critic": rate * self.critic_rate}

    def abstract_batch(self, rows: Batch, array: Callable) -> RolloutBatch:
        """Return rows with what is known of each token, and texts where they are mixed in."""
        values = array(rows.tokens.shape, jnp.float32)
        texts = None
        if self.config.pretrain_weight:
            shape = (self.config.pretrain_rows, rows.tokens.shape[1])
            texts = Batch(**{name: array(shape, dtype) for name, dtype in _TEXT_FIELDS.items()})
        return RolloutBatch(
            rows=rows, old_logps=values, advantages=values, returns=values, old_values=values, pretrain=texts
        )

    def policy_params(self, params: Params) -> Params:
        """Return what is trained of the policy."""
        return params["policy"]

    def measure(self, rows: Batch, params: Params, moving: None, frozen: Params | None) -> Measured:
        """Return what policy, reference and value model say of sampled answers, before the updates of a round."""
        values = self._values(params, frozen, rows, train=True)
        return super().measure(rows, params, moving, frozen)._replace(values=values)

    def judge(self, rows: Batch, measured: Measured, judged: Judged) -> RolloutBatch:
        """Return the rows of a round with their advantages and returns."""
        return actor_critic_batch(rows, measured, judged, config=self.config)

    def totals(self, batch: RolloutBatch) -> Sums:
        """Return the tokens of answers, and of texts."""
        totals = {"weight": jnp.sum(batch.rows.loss_weights)}
        return totals if batch.pretrain is None else totals | {"pretrain": jnp.sum(batch.pretrain.loss_weights)}

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
        """Return the sum of the losses of policy and value model over the tokens of answers.

        The parts: loss, policy, value and pretrain (sums of the losses before their weights), clipped and value_clipped
        (tokens that the clipping holds), moved (k3 of the divergence from the policy that sampled, over tokens).
        """
        del step
        config, mask, beside = self.config, batch.rows.loss_weights, part(frozen, "policy")
        options = dict(train=train, row_keys=row_keys)
        logps = self.forward.token_logps(params["policy"], beside, batch.rows, temperature=self.temperature, **options)
        policy = policy_terms(logps, batch.old_logps, batch.advantages, mask, clip=config.clip)
        values = self._values(params, frozen, batch.rows, **options)
        value = value_terms(values, batch.old_values, batch.returns, mask, clip=config.value_clip)
        parts = {
            "policy": jnp.sum(policy.losses),
            "value": jnp.sum(value.losses),
            "clipped": jnp.sum(policy.clipped),
            "value_clipped": jnp.sum(value.clipped),
            "moved": jnp.sum(masked(k3_kl(logps, batch.old_logps), mask)),
        }
        loss = parts["policy"] + config.value_weight * parts["value"]
        if batch.pretrain is not None:
            parts["pretrain"] = -jnp.sum(
                self.forward.token_logps(params["policy"], beside, batch.pretrain, train=train)
            )
            loss += config.pretrain_weight * parts["pretrain"] * totals["weight"] / totals["pretrain"]
        return loss, parts | {"loss": loss}

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return loss, policy_loss, value_loss, clipped and value_clipped (shares of tokens), approx_kl (from the
        policy that sampled, nats), and pretrain_loss where texts are mixed in."""
        names = {
            "loss": "loss",
            "policy_loss": "policy",
            "value_loss": "value",
            "clipped": "clipped",
            "value_clipped": "value_clipped",
            "approx_kl": "moved",
        }
        metrics = {name: parts[sums] / totals["weight"] for name, sums in names.items()}
        if "pretrain" in parts:
            metrics["pretrain_loss"] = parts["pretrain"] / totals["pretrain"]
        return metrics

    def _values(self, params: Params, frozen: Params | None, rows: Batch, **options: Any) -> jax.Array:
        critic = params["critic"]
        return self.critic.scores(critic["model"], part(frozen, "critic"), critic["score"], rows, **options)
