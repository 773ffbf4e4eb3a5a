"""Held-out evaluation of the policy stages: what answers to held-out prompts are worth."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import numpy as np

from jaxllm.data.example_set import ExampleSet
from jaxllm.sharding.rules import replicated
from jaxllm.train.rollouts.answers import Answered, Prompts, Respondent
from jaxllm.train.rollouts.reward_sum import accuracy
from jaxllm.train.setup import Setup
from jaxllm.train.signals import Votes
from jaxllm.types import Params, TrainState

_EVALUATIONS = 2**32 - 2
"""Folded into the run's key in place of a step's number."""


class HeldoutReward:
    """Rewards of answers to all held-out prompts: the most likely one, and sampled ones if asked for."""

    def __init__(self, setup: Setup, prompts: Sequence[ExampleSet], respondent: Respondent):
        self._setup, self._prompts, self._respondent = setup, Prompts(prompts), respondent
        self._draw = jax.jit(_drawn, out_shardings=replicated(setup.mesh), static_argnums=2)

    def __call__(self, state: TrainState, frozen: Params | None, votes: Votes) -> dict[str, float] | None:
        """Return the metrics; None if a signal cut it short.

        Returns:
          loss (less the reward, as what is drawn falls), reward, reward/<part>, accuracy (where parts know right from
          wrong), answer_tokens and finished (share with a stop token); means over all answers.
        """
        config = self._setup.config
        policy = self._setup.objective.policy(state.params, frozen)
        sampled = config.rollout.eval_samples - 1
        found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        for number, (asked, count) in enumerate(self._prompts.batches(self._setup.eval_batch_size)):
            for samples, greedy in ((1, True), (sampled, False)):
                if not samples:
                    continue
                keys = np.asarray(self._draw(state.rng, np.int32(number), len(asked) * samples))
                answered = self._respondent.answer(*policy, asked, keys, greedy=greedy, stop=votes.ask)
                if answered is None:
                    return None
                for name, values in self._values(answered).items():
                    found[name].append(values[: count * samples])
        metrics = {name: float(np.concatenate(values).mean()) for name, values in found.items()}
        return {"loss": -metrics["reward"]} | metrics

    def _values(self, answered: Answered) -> dict[str, np.ndarray]:
        """Return what is told of each answer, float64 [R] each."""
        parts = answered.worth.parts
        values = {"reward": answered.scores} | {f"reward/{name}": part for name, part in parts.items()}
        right = accuracy(self._setup.config.rewards, parts)
        if right is not None:
            values["accuracy"] = right
        return values | {"answer_tokens": answered.num_tokens, "finished": answered.finished}


def _drawn(rng: jax.Array, number: jax.Array, count: int) -> jax.Array:
    """Draw the keys of a batch's answers, uint32 [count, 2]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(rng), _EVALUATIONS), number)
    return jax.random.key_data(jax.random.split(key, count))
