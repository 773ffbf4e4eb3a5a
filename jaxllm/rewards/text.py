"""Rewards read from an answer's text alone, or from it and a reference."""

from __future__ import annotations

import re
from collections.abc import Callable

import regex

from jaxllm.errors import InputError
from jaxllm.rewards.answers import find_answer, marked_answer, same_answer
from jaxllm.rewards.base import Completion, RewardFunction, each, reference_of

# A pattern that needs longer than this backtracks without end on some texts.
PATTERN_SECONDS = 2.0
# Words, but each character of scripts that write without spaces.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def exact(pattern: str | None) -> RewardFunction:
    """Return 1 where the answer is the reference, or one of a list of them, surrounding spaces aside; else 0.

    Args:
      pattern: the answer is group 1 of its last match in the response (one of several lines needs (?s)); without a
        match there is none. None: the answer is the whole response.
    """
    stated = stated_answer(pattern)

    def score(completion: Completion) -> float:
        answer = stated(completion)
        references = [text.strip() for text in _references("exact", completion)]
        return float(answer is not None and answer.strip() in references)

    return each(score)


def math(pattern: str | None) -> RewardFunction:
    r"""Return 1 where the answer equals the reference, or one of a list of them, as a number; else 0.

    Numbers are compared as rationals, tuples, intervals and sets by their parts, all else as text (`same_answer`). Of
    a reference with a \boxed{} or "####" only what is marked counts.

    Args:
      pattern: as for `exact`; None: `find_answer` looks for it.
    """
    stated = stated_answer(pattern) if pattern else lambda completion: find_answer(completion.response)

    def score(completion: Completion) -> float:
        answer = stated(completion)
        references = [marked_answer(text) or text for text in _references("math", completion)]
        return float(answer is not None and any(same_answer(answer, reference) for reference in references))

    return each(score)


def matches(pattern: str) -> RewardFunction:
    """Return 1 where the pattern is found in the response, else 0; ^, $ and (?s) are the pattern's to write."""
    compiled = _compiled(pattern)
    return each(lambda completion: float(bool(_find_all(compiled, completion))))


def length(target: int) -> RewardFunction:
    """Return 0 up to `target` tokens, from there on a line down to -1 at twice as many, and -1 beyond."""
    return each(lambda completion: -min(1.0, max(0.0, completion.num_tokens / target - 1)))


def repetition(ngram: int) -> RewardFunction:
    """Return minus the share of an answer's runs of `ngram` words that stood in it before, from -1 to 0."""

    def score(completion: Completion) -> float:
        words = _WORDS.findall(completion.response)
        runs = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
        return len(set(runs)) / len(runs) - 1 if runs else 0.0

    return each(score)


def _references(name: str, completion: Completion) -> list[str]:
    reference = reference_of(name, completion)
    references = reference if isinstance(reference, list) else [reference]
    for one in references:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise InputError(f"{completion.origin}: the reference {one!r} is no text and no number ({name})")
    return [str(one) for one in references]


def stated_answer(pattern: str | None) -> Callable[[Completion], str | None]:
    """Return what finds the answer in a response: group 1 of the last match; without a pattern, all of it."""
    if pattern is None:
        return lambda completion: completion.response
    compiled = _compiled(pattern)
    if not compiled.groups:
        raise InputError(f"pattern {pattern!r} has no group; expected one around the answer, as in 'A: (.*)'")

    def find(completion: Completion) -> str | None:
        found = _find_all(compiled, completion)
        return found[-1][1] if found else None

    return find


def _compiled(pattern: str) -> regex.Pattern:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise InputError(f"pattern {pattern!r} is no regular expression: {error}") from None


def _find_all(compiled: regex.Pattern, completion: Completion) -> list[regex.Match]:
    try:
        return list(compiled.finditer(completion.response, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise InputError(
            f"pattern {compiled.pattern!r} took more than {PATTERN_SECONDS:g} seconds on the answer to "
            f"{completion.origin}, of {len(completion.response)} characters; expected one that does not backtrack so"
        ) from None
