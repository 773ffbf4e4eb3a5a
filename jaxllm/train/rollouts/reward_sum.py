"""What answers are worth: the parts of a reward, their sum, and how it is kept on one scale during a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config.alignment import PPOConfig, RewardConfig
from jaxllm.errors import InputError
from jaxllm.losses.ppo import RunningMoments, llama2_scores

Steps = Mapping[int, float]
"""Number of the last token of a step within its answer -> what the step is worth."""

_EXACT = frozenset({"exact", "math", "code", "reasoning_gym"})


class Worth(NamedTuple):
    """What R answers are worth.

    Attributes:
      parts: name of a part -> float64 [R]; where a part is about steps, their sum.
      steps: of each answer, with the weights of the parts; None where no part is about steps.
    """

    parts: dict[str, np.ndarray]
    steps: list[Steps] | None


def part_name(config: RewardConfig) -> str:
    """Return what a part is called in the records."""
    return config.name or config.kind


def accuracy(configs: Sequence[RewardConfig], parts: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return which answers are right by all parts that know right from wrong, bool [R]; None where none does."""
    right = [parts[part_name(config)] >= 1 for config in configs if config.kind in _EXACT]
    return np.all(right, axis=0) if right else None


def weigh_steps(
    configs: Sequence[RewardConfig], told: Sequence[Mapping[str, float | Steps]], num_tokens: Sequence[int]
) -> Worth:
    """Return what parts told of answers as arrays; what is told of a whole answer counts at its last token.

    Args:
      told: of each answer what each part says: of all of it, or of its steps. num_tokens: of each answer.
    """
    parts: dict[str, np.ndarray] = {}
    steps: list[dict[int, float]] = [{} for _ in told]
    has_steps = False
    for config in configs:
        name = part_name(config)
        parts[name] = np.zeros(len(told))
        for row, found in enumerate(values[name] for values in told):
            has_steps |= isinstance(found, Mapping)
            each = found if isinstance(found, Mapping) else {num_tokens[row] - 1: found}
            parts[name][row] = sum(each.values())
            for end, value in each.items():
                steps[row][end] = steps[row].get(end, 0.0) + config.weight * value
    return Worth(parts, steps if has_steps else None)


def step_arrays(steps: Sequence[Steps], prompt_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (what steps are worth, slots of their last tokens): float32 and int32 [R, S], -1 where there is none.

    S is a power of two, so that few shapes occur.
    """
    most = max(map(len, steps), default=1)
    width = 1 << max(most - 1, 0).bit_length()
    scores, ends = np.zeros((len(steps), width), np.float32), np.full((len(steps), width), -1, np.int32)
    for row, (each, length) in enumerate(zip(steps, prompt_lengths, strict=True)):
        for place, end in enumerate(sorted(each)):
            # The first token of the answer is chosen in the last slot of the prompt.
            scores[row, place], ends[row, place] = each[end], length - 1 + end
    return scores, ends


def combine(
    configs: Sequence[RewardConfig], parts: Mapping[str, np.ndarray], is_safety: np.ndarray, rule: str = "sum"
) -> np.ndarray:
    """Return the reward of each answer, float64 [R].

    Args:
      is_safety: bool [R], prompts that ask for what is not safe.
      rule: "sum" by weight, or "llama2": one of the parts safety and helpfulness, and the sum of the others.
    """
    weighed = {part_name(config): config.weight * parts[part_name(config)] for config in configs}
    chosen = np.zeros(len(is_safety))
    if rule == "llama2":
        for name in ("safety", "helpfulness"):
            del weighed[name]
        chosen = np.asarray(llama2_scores(parts["safety"], parts["helpfulness"], is_safety), np.float64)
    return sum(weighed.values(), chosen)


@dataclasses.dataclass
class RewardScale:
    """Rewards on the scale of a run: less their running mean, over their running deviation, clipped."""

    config: PPOConfig
    moments: RunningMoments = dataclasses.field(default_factory=RunningMoments)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Take in the rewards of a round [R] and return them scaled, float64 [R]."""
        kind, most = self.config.normalize_rewards, self.config.reward_clip
        if kind in ("mean", "mean_std"):
            scores = self.moments.update(scores).normalize(scores, divide=kind == "mean_std")
        if kind == "whiten":
            scores = RunningMoments().update(scores).normalize(scores, divide=True)
        return scores if most is None else np.clip(scores, -most, most)

    def state(self) -> dict[str, Any]:
        """Return what was seen so far, as JSON values."""
        return dataclasses.asdict(self.moments)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.moments = RunningMoments(**state)


def require_steps(worth: Worth, wanted: bool) -> None:
    """Raise InputError unless rewards are about steps where they are to be, and about answers elsewhere."""
    if wanted and worth.steps is None:
        raise InputError(
            "rewards: no part gives rewards of steps; grpo.supervision 'process' needs a function that returns "
            "(end character, reward) of each step"
        )
    if not wanted and worth.steps is not None:
        raise InputError("rewards: a part gives rewards of steps, which only grpo.supervision 'process' takes")
