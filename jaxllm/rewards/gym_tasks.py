"""Tasks of the package reasoning-gym: rows of prompts, and their verifiers as a reward."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.errors import InputError, missing_extra
from jaxllm.rewards.base import Completion, RewardFunction, checked, each
from jaxllm.rewards.text import stated_answer


def gym_rows(name: str, *, size: int, seed: int, options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows for RL: "prompt", "reference", and "dataset" and "entry" for the verifier; all can be JSON.

    Args:
      name: of the dataset, such as "chain_sum". size: rows. options: of the dataset, by the package's names.

    Raises:
      InputError: the package is missing, no such dataset or option, or rows whose entries JSON cannot hold so that
        their verifier still accepts the reference.
    """
    package = _package()
    if name not in package.factory.DATASETS:
        raise InputError(f"reasoning_gym has no dataset {name!r}; it has {', '.join(sorted(package.factory.DATASETS))}")
    try:
        dataset = package.create_dataset(name, size=size, seed=seed, **(options or {}))
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"reasoning_gym {name}: {error}") from error
    verify = package.get_score_answer_fn(name)
    for entry in dataset:
        try:
            kept = json.loads(json.dumps(entry))
        except TypeError as error:
            raise InputError(f"reasoning_gym {name}: its entries cannot be written as JSON: {error}") from error
        reference = entry["answer"]
        if verify(answer=reference, entry=kept) != verify(answer=reference, entry=entry):
            raise InputError(f"reasoning_gym {name}: its entries mean something else once they were written as JSON")
        yield {"prompt": entry["question"], "reference": reference, "dataset": name, "entry": kept}


def gym_reward(pattern: str | None) -> RewardFunction:
    """Return the score, 0 to 1, that the verifier of a row's dataset gives to the answer.

    Args:
      pattern: the answer is group 1 of its last match in the response, no match scores 0; None: the whole response.
    """
    package = _package()
    stated = stated_answer(pattern)

    def score(completion: Completion) -> float:
        name, entry = completion.row.get("dataset"), completion.row.get("entry")
        if name not in package.factory.DATASETS or not isinstance(entry, dict):
            raise InputError(
                f'{completion.origin}: "dataset" is {name!r} and "entry" is of type {type(entry).__name__}; expected '
                "a row written by gym_rows (the reward reasoning_gym)"
            )
        answer = stated(completion)
        return 0.0 if answer is None else package.get_score_answer_fn(name)(answer=answer.strip(), entry=entry)

    return checked("reasoning_gym", each(score))


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise missing_extra("reasoning-gym", "rl", "making and scoring reasoning-gym tasks") from None
    return reasoning_gym
