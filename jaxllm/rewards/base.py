"""What a reward function is given and must return, and what is said when it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from jaxllm.errors import InputError

SHOWN_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer and what is known about its prompt.

    response: the answer's text. reference: the row's "reference" or "answer", None without one. row: the row of the
    data, where "_origin" is its path:line. num_tokens: of the answer, with its stop token. finished: it has one.
    """

    prompt: str
    response: str
    reference: Any
    row: Mapping[str, Any]
    num_tokens: int
    finished: bool

    @property
    def origin(self) -> str:
        """Where the prompt came from, for messages."""
        return str(self.row.get("_origin", "a row without a place"))


# The reward of an answer, or those of its steps: (end of the step in characters of the response, its reward).
Reward = float | Sequence[tuple[int, float]]
RewardFunction = Callable[[Sequence[Completion]], Sequence[Reward]]


def each(score: Callable[[Completion], float]) -> RewardFunction:
    """Make a reward function of one that scores a single answer."""
    return lambda completions: [score(completion) for completion in completions]


def checked(name: str, function: RewardFunction) -> RewardFunction:
    """Wrap a function that others wrote: what it raises or returns wrongly becomes one clear `InputError`.

    Args:
      name: what the function is called in messages.
    """

    def call(completions: Sequence[Completion]) -> list[Reward]:
        try:
            found = function(completions)
            rewards = None if found is None else list(found)
        except InputError:
            raise
        except Exception as error:  # a user's function may raise anything
            culprit = _first_that_raises(function, completions)
            raise InputError(f"{name} raised {type(error).__name__}: {error}{_sample(culprit)}") from error
        if rewards is None or len(rewards) != len(completions):
            number = "no" if rewards is None else len(rewards)
            raise InputError(f"{name} returned {number} rewards; expected {len(completions)}, one for each answer")
        return [_checked_reward(name, *pair) for pair in zip(rewards, completions, strict=True)]

    return call


def reference_of(name: str, completion: Completion) -> Any:
    """Return the reference, which the reward `name` cannot do without."""
    if completion.reference is None:
        raise InputError(f'{completion.origin}: no "reference" or "answer", which the reward {name} compares with')
    return completion.reference


def _first_that_raises(function: RewardFunction, completions: Sequence[Completion]) -> Completion:
    """Find the answer that the function fails on by itself; the first one if it fails on none."""
    for completion in completions:
        try:
            list(function([completion]))
        except Exception:  # as above
            return completion
    return completions[0]


def _checked_reward(name: str, reward: Any, completion: Completion) -> Reward:
    if isinstance(reward, Real) and math.isfinite(reward):
        return float(reward)
    if isinstance(reward, list | tuple) and all(_is_step(step, len(completion.response)) for step in reward):
        return [(int(end), float(value)) for end, value in reward]
    raise InputError(
        f"{name} returned {reward!r}; expected a finite number, or a list of (end, reward), one for each step, with "
        f"0 < end <= {len(completion.response)}, the characters of the response{_sample(completion)}"
    )


def _is_step(step: Any, length: int) -> bool:
    if not (isinstance(step, list | tuple) and len(step) == 2 and isinstance(step[0], Integral)):
        return False
    return 0 < step[0] <= length and isinstance(step[1], Real) and math.isfinite(step[1])


def _sample(completion: Completion) -> str:
    return f"; the answer to {completion.origin} was {completion.response[:SHOWN_CHARACTERS]!r}"
