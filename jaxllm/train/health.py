"""Warnings about a run that learns nothing, each with the option to turn; read from the metrics that are recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.config.alignment import HealthConfig
from jaxllm.train.objectives import Objective

REPEAT_STEPS = 100
"""A warning is told again after so many steps."""

_FIRST_ROUNDS = 3
"""Rounds whose answers say what length is usual."""
_PATIENCE = 3
"""What may be chance is told when it was seen so many times after each other."""
_SAME = 1e-12
"""Nats. Less than this parts no policy from its reference after an update, whatever the learning rate."""
_ROUNDING = 2.0
"""A distance of two models that are the same may be so many times what it was when the run began."""
_FULL_RATE = 0.5
"""From this share of the learning rate on, what a policy learns in a few updates is more than rounding."""


@dataclasses.dataclass
class _Memory:
    """What earlier metrics said; plain values, for a checkpoint."""

    told: dict[str, int] = dataclasses.field(default_factory=dict)
    first_lengths: list[float] = dataclasses.field(default_factory=list)
    equal_rounds: int = 0
    same_steps: int = 0
    updated: bool = False
    first_distance: float | None = None


class Health:
    """Watches a run. Metrics that a stage does not record are not missed.

    It reads, of a round: reward_std and equal_groups (share of groups with equal rewards), finished (share of answers
    with a stop token), answer_tokens (mean length), kl (nats per answer from the reference); of a step: clipped (share
    of ratios), reference_distance (nats between the log-probabilities of answers), trained_tokens, learning_rate.
    """

    def __init__(
        self,
        config: HealthConfig,
        *,
        learning_rate: float = 0.0,
        reference_moves: bool = False,
        begins_as_reference: bool = False,
    ):
        """Start without a past.

        Args:
          learning_rate: the largest of the run; while it warms up a policy need not leave its reference.
          reference_moves: the policy becomes the reference now and then, so that they may be equal.
          begins_as_reference: before the first update they are equal, so that what parts them then is rounding.
        """
        self._config = config
        self._full_rate = _FULL_RATE * learning_rate
        self._reference_moves = reference_moves
        self._begins_as_reference = begins_as_reference
        self._memory = _Memory()

    @classmethod
    def of_run(cls, config: RunConfig, objective: Objective) -> Health:
        """Return the watch over a run that has not begun."""
        adapter, is_dpo = config.adapter, config.stage == "dpo"
        named = config.dpo.reference_weights if is_dpo else config.rollout and config.rollout.reference_weights
        begins_as_reference = (
            named in (None, config.model.weights)
            and (adapter is None or (adapter.kind != "prefix" and adapter.weights is None))
            # Dropout parts the two where the loss itself measures their distance.
            and not (is_dpo and objective.draws)
        )
        return cls(
            config.health,
            learning_rate=config.optimizer.learning_rate,
            reference_moves=objective.moves_reference,
            begins_as_reference=begins_as_reference,
        )

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take in the metrics of a step and return the warnings that are due, one line each."""
        memory, found = self._memory, {}
        distance = _reference_distance(metrics)
        if memory.first_distance is None and distance is not None:
            memory.first_distance = distance if self._begins_as_reference else 0.0
        for name, check in _CHECKS.items():
            line = check(metrics, self._config, memory)
            if line is not None and not (name == "reference_equals_policy" and self._reference_moves):
                found[name] = f"{name}: {line}"
        rate = metrics.get("learning_rate", 1.0)
        memory.updated |= rate > 0 and rate >= self._full_rate
        due = {name for name in found if step - memory.told.get(name, step - REPEAT_STEPS) >= REPEAT_STEPS}
        memory.told |= dict.fromkeys(due, step)
        return [line for name, line in found.items() if name in due]

    def state(self) -> dict[str, Any]:
        """Return what must be remembered, as JSON values."""
        return dataclasses.asdict(self._memory)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; one of an earlier version does not know the first distance."""
        self._memory = _Memory(**{"first_distance": 0.0} | dict(state))


def _all_rewards_equal(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    if "reward_std" not in metrics:
        return None
    equal = metrics["equal_groups"] >= 1 if "equal_groups" in metrics else metrics["reward_std"] < _SAME
    memory.equal_rounds = memory.equal_rounds + 1 if equal else 0
    if memory.equal_rounds < _PATIENCE:
        return None
    return (
        f"for {memory.equal_rounds} rounds no answer was worth more than the others to its prompt, so that nothing is "
        "learned; raise rollout.samples or rollout.temperature, take prompts that are neither too hard nor too easy, "
        "or check rewards"
    )


def _clipped_ratio_high(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    if metrics.get("clipped", 0.0) <= config.clipped:
        return None
    return (
        f"{metrics['clipped']:.0%} of the ratios are clipped, more than {config.clipped:.0%}; lower "
        "optimizer.learning_rate or rollout.epochs"
    )


def _no_stop_token(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    unfinished = 1 - metrics.get("finished", 1.0)
    if unfinished <= config.unfinished:
        return None
    return (
        f"{unfinished:.0%} of the answers have no stop token; raise rollout.max_new_tokens, or start from a model that "
        "was trained to end its turns (stage sft with the same chat.format)"
    )


def _kl_blow_up(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    if metrics.get("kl", 0.0) <= config.kl:
        return None
    return (
        f"the policy is {metrics['kl']:.3g} nats per answer away from the reference, more than {config.kl:g}; raise "
        "grpo.kl_coef or ppo.kl_coef, or lower optimizer.learning_rate"
    )


def _length_explosion(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    if "answer_tokens" not in metrics:
        return None
    if len(memory.first_lengths) < _FIRST_ROUNDS:
        memory.first_lengths.append(metrics["answer_tokens"])
        return None
    usual = sum(memory.first_lengths) / _FIRST_ROUNDS
    if metrics["answer_tokens"] <= config.length_growth * usual:
        return None
    return (
        f"answers have {metrics['answer_tokens']:.0f} tokens, {metrics['answer_tokens'] / usual:.1f} times as many as "
        "in the first rounds; add one of kind length to rewards, or lower rollout.max_new_tokens"
    )


def _loss_mask_empty(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    if metrics.get("trained_tokens", 1) > 0:
        return None
    return (
        "no token of the batch is trained; check chat.format, chat.turns and the roles of the rows (jaxllm data "
        "check), and raise data.seq_len if it cuts answers off"
    )


def _reference_equals_policy(metrics: Mapping[str, float], config: HealthConfig, memory: _Memory) -> str | None:
    distance = _reference_distance(metrics)
    if distance is None:
        return None
    same = distance <= max(_SAME, _ROUNDING * (memory.first_distance or 0.0))
    memory.same_steps = memory.same_steps + 1 if memory.updated and same else 0
    if memory.same_steps < _PATIENCE:
        return None
    return (
        "after updates the policy still says exactly what the reference does; raise optimizer.learning_rate, or check "
        "that what adapter.targets names is trained and that reference_weights is not this run"
    )


def _reference_distance(metrics: Mapping[str, float]) -> float | None:
    distances = [abs(metrics[name]) for name in ("reference_distance", "kl") if name in metrics]
    return max(distances, default=None)


_CHECKS = {
    "all_rewards_equal": _all_rewards_equal,
    "clipped_ratio_high": _clipped_ratio_high,
    "no_stop_token": _no_stop_token,
    "kl_blow_up": _kl_blow_up,
    "length_explosion": _length_explosion,
    "loss_mask_empty": _loss_mask_empty,
    "reference_equals_policy": _reference_equals_policy,
}
