"""Batches of the policy stages: in rounds, prompts are answered, the answers judged, and then trained on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.alignment import PPOConfig
from jaxllm.data.loader import TrainLoader
from jaxllm.errors import InputError
from jaxllm.losses.grpo import k3_kl
from jaxllm.losses.masked import masked, masked_mean
from jaxllm.sharding.rules import replicated
from jaxllm.train.feed import local_rows
from jaxllm.train.objectives.advantages import Judged, Measured
from jaxllm.train.rollouts.answers import Answered, Asked, Respondent
from jaxllm.train.rollouts.microbatches import by_microbatches
from jaxllm.train.rollouts.reward_sum import RewardScale, require_steps, step_arrays
from jaxllm.train.setup import Setup
from jaxllm.train.signals import Votes
from jaxllm.train.sources import Fed
from jaxllm.types import Batch, Params, RolloutBatch, TrainState

_ROUNDS = 2**32 - 1
"""Folded into the run's key in place of a step's number."""


@dataclasses.dataclass(frozen=True)
class _Round:
    """The answers of a round, R rows.

    Attributes:
      order: int [updates, B], the rows of each update. documents: int64 [R], the prompts' numbers.
    """

    batch: RolloutBatch
    order: np.ndarray
    documents: np.ndarray
    metrics: dict[str, Any]


class RolloutSource:
    """Batches of answers that the policy of the round's beginning gave.

    A run is saved between rounds only, so that no answers need saving.
    """

    def __init__(self, setup: Setup, loader: TrainLoader, respondent: Respondent, texts: TrainLoader | None = None):
        """Open the prompts at the beginning.

        Args:
          loader: of one lane of prompts, alike in all processes. texts: the same, of rows that are mixed in.

        Raises:
          InputError: a process would hold a part of a group.
        """
        self.setup, self.objective, self.respondent = setup, setup.objective, respondent
        config = setup.config
        self._rollout = config.rollout
        self._loader, self._texts = loader, texts
        self._scale = RewardScale(config.ppo)
        self._rows = config.rollout.prompts * config.rollout.samples
        self._updates = config.rollout.epochs * self._rows // config.train.batch_size
        self._round: _Round | None = None
        require_whole_groups(setup)
        rows = setup.feed.sharding
        whole = replicated(setup.mesh)
        parts = setup.microbatches(self._rows)
        self._measure = jax.jit(by_microbatches(self.objective.measure, parts), out_shardings=rows)
        self._judge = jax.jit(self._judged, out_shardings=(rows, whole))
        self._take = jax.jit(lambda batch, rows: jax.tree.map(lambda array: array[rows], batch), out_shardings=rows)
        self._draw = jax.jit(self._drawn, out_shardings=whole)

    def restore(self, position: dict[str, Any]) -> None:
        """Continue where `position` was taken."""
        _restore(self._loader, position["prompts"])
        if self._texts is not None:
            _restore(self._texts, position["texts"])
        self._scale.restore(position["rewards"])

    @contextlib.contextmanager
    def running(self, step: int, votes: Votes) -> Iterator[None]:
        """Give batches from a round's beginning on."""
        del step
        self._votes = votes
        yield

    def next(self, state: TrainState, frozen: Params | None, step: int) -> Fed | None:
        """Return the batch of an update; before the first of a round prompts are answered."""
        number, update = divmod(step, self._updates)
        metrics = {}
        if update == 0:
            state = self._with_reference(state, number)
            self._round = self._new_round(state, frozen, step)
            if self._round is None:
                return None
            metrics = self._round.metrics
        rows = self._round.order[update]
        batch = self._take(self._round.batch, rows)
        if self._texts is not None:
            texts = self._texts.next_batch(self.setup.config.ppo.pretrain_rows)
            batch = batch.replace(pretrain=self.setup.feed.whole_to_devices(texts))
        return Fed(state, batch, self._round.documents[rows], metrics)

    def may_stop(self, step: int) -> bool:
        """Return whether a round ends before `step`."""
        return step % self._updates == 0

    def position(self) -> dict[str, Any]:
        """Return which prompts come next, and what rewards were seen."""
        position = {"prompts": _state(self._loader), "rewards": self._scale.state()}
        return position if self._texts is None else position | {"texts": _state(self._texts)}

    def describe(self, document_ids: np.ndarray) -> list[str]:
        """Name the prompts of rows."""
        return self._loader.describe(document_ids)

    def _with_reference(self, state: TrainState, number: int) -> TrainState:
        """Make the policy the reference, where the reference moves before this round."""
        if not self.objective.moves_reference or number == 0 or number % self.setup.config.grpo.reference_every:
            return state
        return state.replace(reference=jax.tree.map(jnp.copy, state.params))

    def _new_round(self, state: TrainState, frozen: Params | None, step: int) -> _Round | None:
        before = self._loader.state()
        prompts = self._loader.next_batch(self._rollout.prompts)
        asked = [
            Asked(int(document), ids[:length].tolist(), self._loader.prompt(int(document)))
            for document, ids, length in zip(prompts["document_ids"], prompts["tokens"], prompts["length"], strict=True)
        ]
        keys, order = map(np.asarray, self._draw(state.rng, np.int32(step // self._updates)))
        policy = self.objective.policy(state.params, frozen)
        answered = self.respondent.answer(*policy, asked, keys, stop=self._votes.ask)
        if answered is None:
            self._loader.restore(before)
            return None
        measured = self._measure(answered.rows, state.params, state.reference, frozen)
        judged = self._judgement(answered, step)
        batch, metrics = self._judge(answered.rows, measured, answered.logps, judged)
        if self.setup.config.stage == "ppo" and step < self.setup.config.ppo.critic_warmup:
            # The policy has not moved yet, and need not.
            metrics.pop("kl", None)
        metrics |= _statistics(answered, self._rollout.samples)
        return _Round(batch, order, np.repeat(prompts["document_ids"], self._rollout.samples), metrics)

    def _judgement(self, answered: Answered, step: int) -> Judged:
        """Return what advantages follow from."""
        config, scores, steps = self.setup.config, answered.scores, answered.worth.steps
        wants_steps = config.stage == "grpo" and config.grpo.supervision == "process"
        require_steps(answered.worth, wants_steps)
        if config.stage == "ppo":
            scores = self._scale(scores)
        step_scores, step_ends = step_arrays(steps, answered.prompt_lengths) if wants_steps else (None, None)
        kl_coef = np.float32(kl_coefficient(config.ppo, step / config.train.steps))
        return Judged(np.float32(scores), step_scores, step_ends, kl_coef)

    def _judged(
        self, rows: Batch, measured: Measured, sampled: jax.Array, judged: Judged
    ) -> tuple[RolloutBatch, dict[str, jax.Array]]:
        mask, metrics = rows.loss_weights, {}
        if measured.logps is None:
            # The update tells logp_gap and kl: the rounding of sampling, added up over an answer, is no divergence.
            measured = measured._replace(logps=sampled)
        else:
            metrics["logp_gap"] = jnp.max(jnp.abs(masked(measured.logps - sampled, mask)))
            if measured.ref_logps is not None:
                divergence = masked(k3_kl(measured.logps, measured.ref_logps), mask)
                metrics["kl"] = jnp.mean(jnp.sum(divergence, axis=-1))
        metrics["entropy"] = -masked_mean(measured.logps, mask)
        return self.objective.judge(rows, measured, judged), metrics

    def _drawn(self, rng: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw the keys of a round's answers, uint32 [R, 2], and in which order they are trained on."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(rng), _ROUNDS), number)
        answers, epochs = jax.random.split(key)
        order = jax.vmap(lambda epoch: jax.random.permutation(epoch, self._rows))
        orders = order(jax.random.split(epochs, self._rollout.epochs))
        return jax.random.key_data(jax.random.split(answers, self._rows)), orders.reshape(self._updates, -1)


def kl_coefficient(config: PPOConfig, progress: float) -> float:
    """Return the weight of the divergence in the reward; `progress` is the share of the run that is done."""
    end = config.kl_coef if config.kl_coef_end is None else config.kl_coef_end
    return config.kl_coef + (end - config.kl_coef) * progress


def _state(loader: TrainLoader) -> dict[str, Any]:
    """Return the position of each lane, by its number as text (JSON has no other keys)."""
    return {str(lane): where for lane, where in loader.state().items()}


def _restore(loader: TrainLoader, state: dict[str, Any]) -> None:
    loader.restore({int(lane): where for lane, where in state.items()})


def _statistics(answered: Answered, samples: int) -> dict[str, float]:
    """Return what a round's answers are like."""
    scores, num_tokens = answered.scores, answered.num_tokens
    groups = scores.reshape(-1, samples) if samples > 1 else scores[None]
    metrics = {"reward": scores.mean(), "reward_std": groups.std(axis=1).mean()}
    metrics |= {f"reward/{name}": values.mean() for name, values in answered.worth.parts.items()}
    if samples > 1:
        metrics["equal_groups"] = np.mean(groups.max(axis=1) == groups.min(axis=1))
    metrics |= {"answer_tokens": num_tokens.mean(), "finished": answered.finished.mean()}
    metrics["sampled_tokens_per_second"] = num_tokens.sum() / answered.seconds
    return {name: float(value) for name, value in metrics.items()}


def require_whole_groups(setup: Setup) -> None:
    """Raise InputError where a process would hold some of the answers to a prompt."""
    rollout = setup.config.rollout
    rows, samples = rollout.prompts * rollout.samples, rollout.samples
    mine = local_rows(setup.feed.sharding, rows)
    if len(mine) % samples or any(row % samples for row in mine[::samples]):
        raise InputError(
            f"rollout.prompts: the {rows // samples} prompts of a round cannot be split over the processes; expected a "
            f"multiple of the {rows // len(mine)} groups of processes that hold different rows"
        )
