"""From one reward of the configuration to its function."""

from __future__ import annotations

from collections.abc import Callable

from jaxllm.config.alignment import RewardConfig
from jaxllm.errors import InputError
from jaxllm.rewards import text
from jaxllm.rewards.base import RewardFunction
from jaxllm.rewards.code import code
from jaxllm.rewards.gym_tasks import gym_reward
from jaxllm.rewards.user_function import user_function


def make_reward(config: RewardConfig) -> RewardFunction:
    """Return the function that a configuration describes; its weight is the caller's to apply.

    Raises:
      InputError: an option that the kind needs is missing or wrong.
      ValueError: the kind is "model": reward models need what training holds, and are made there.
    """
    if config.kind not in _MAKERS:
        raise ValueError(f"kind is {config.kind!r}; expected one of {', '.join(_MAKERS)}")
    return _MAKERS[config.kind](config)


def _regex(config: RewardConfig) -> RewardFunction:
    return text.matches(_given(config, "pattern"))


def _length(config: RewardConfig) -> RewardFunction:
    return text.length(_given(config, "target"))


def _code(config: RewardConfig) -> RewardFunction:
    if not config.allow_code:
        raise InputError(
            "the reward code runs what the model wrote on this machine, held back by limits but in no security "
            "sandbox; expected allow_code: true"
        )
    return code(timeout=config.timeout, memory_mb=config.memory_mb)


def _given(config: RewardConfig, field: str):
    value = getattr(config, field)
    if value is None:
        raise InputError(f"the reward {config.kind} needs {field!r}")
    return value


_MAKERS: dict[str, Callable[[RewardConfig], RewardFunction]] = {
    "exact": lambda config: text.exact(config.pattern),
    "math": lambda config: text.math(config.pattern),
    "regex": _regex,
    "length": _length,
    "repetition": lambda config: text.repetition(config.ngram),
    "function": lambda config: user_function(_given(config, "path")),
    "code": _code,
    "reasoning_gym": lambda config: gym_reward(config.pattern),
}
