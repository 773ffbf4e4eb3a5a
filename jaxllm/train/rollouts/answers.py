"""Answers to prompts, sampled with the run's own parameters, and what rewards say of them.

Every process knows all prompts of a round. It samples the answers whose rows its devices hold and judges them; what it
finds is told to all, so that statistics are the same everywhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.config.alignment import RewardConfig
from jaxllm.data.example_set import ExampleSet
from jaxllm.data.examples import Encoder
from jaxllm.data.rows import Prompt
from jaxllm.errors import InputError
from jaxllm.generate.rollout import Sampler
from jaxllm.generate.samples import Samples, rollout_rows
from jaxllm.rewards.base import Completion, Reward, RewardFunction
from jaxllm.sharding.processes import gather, together
from jaxllm.tokenizers.base import StreamDecoder, Tokenizer
from jaxllm.train.feed import Feed, local_rows
from jaxllm.train.rollouts.reward_model import ModelReward, Said
from jaxllm.train.rollouts.reward_sum import Steps, Worth, combine, weigh_steps
from jaxllm.types import Batch, Params


class Asked(NamedTuple):
    """A prompt: its number among all that are read, its ids, and what it was made from."""

    document: int
    ids: list[int]
    prompt: Prompt


class Prompts:
    """All prompts of some sources, in order."""

    def __init__(self, sets: Sequence[ExampleSet]):
        self._places = [(examples, number) for examples in sets for number in range(len(examples))]

    def __len__(self) -> int:
        return len(self._places)

    def batches(self, size: int, first: int = 0) -> Iterator[tuple[list[Asked], int]]:
        """Yield the prompts from `first` on by `size`, with how many of them count: the last batch is filled up."""
        for begin in range(first, len(self), size):
            asked = [self._asked(number) for number in range(begin, min(begin + size, len(self)))]
            yield asked + asked[:1] * (size - len(asked)), len(asked)

    def _asked(self, number: int) -> Asked:
        examples, place = self._places[number]
        return Asked(number, examples.tokens(place)[0].ids.tolist(), examples.prompt(place))


@dataclasses.dataclass(frozen=True)
class Answered:
    """R answers, in all processes alike.

    Attributes:
      rows: prompts and answers on the mesh. logps: float32 [R, T], as they were sampled, as `rows` lie.
      prompt_lengths, num_tokens: int [R]; the stop token of an answer counts. finished: bool [R], whether it has one.
      worth: what the answers are worth, part by part. scores: float64 [R], and on the whole.
      seconds: time of the sampling alone.
    """

    rows: Batch
    logps: jax.Array
    prompt_lengths: np.ndarray
    num_tokens: np.ndarray
    finished: np.ndarray
    worth: Worth
    scores: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Respondent:
    """Samples answers and has them judged.

    Attributes:
      rewards: what is rewarded. functions: those that judge answers one by one, by name. models: those that a reward
        model judges.
      combine: how parts become a score, see `reward_sum.combine`.
    """

    feed: Feed
    encoder: Encoder
    sampler: Sampler
    rewards: Sequence[RewardConfig]
    functions: Mapping[str, RewardFunction]
    models: Mapping[str, ModelReward]
    combine: str = "sum"

    def answer(
        self,
        params: Params,
        adapter: Any,
        asked: Sequence[Asked],
        keys: np.ndarray,
        *,
        greedy: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> Answered | None:
        """Sample and judge; all processes call this alike.

        Args:
          keys: uint32 [R, 2], a random key for each answer; as many successive ones for each prompt.
          greedy, stop: as in `Sampler.sample`.

        Returns:
          the answers, in the order of the keys, or None if `stop` said so.

        Raises:
          InputError: a reward was refused.
        """
        my_rows, samples = local_rows(self.feed.sharding, len(keys)), len(keys) // len(asked)
        mine = [asked[row // samples] for row in my_rows]
        # Parameters come from the step before: its time is not that of the sampling.
        jax.block_until_ready(params)
        began = time.monotonic()
        prompts = [each.ids for each in mine[::samples]]
        sampled = self.sampler.sample(params, adapter, prompts, keys[my_rows], greedy=greedy, stop=stop)
        if sampled is None:
            return None
        seconds = time.monotonic() - began
        texts = self._texts(sampled)
        told = _by_row(gather(list(zip(my_rows, together(lambda: self._judge(mine, texts, sampled)), strict=True))))
        places = self.encoder.places
        rows = self.feed.to_devices(rollout_rows(sampled, places.spec, places.prefix_ids), len(keys))
        prompt_lengths, num_tokens = (np.array([each[name] for each in told]) for name in ("prompt", "tokens"))
        parts = [{name: _steps(value) for name, value in each["parts"].items()} for each in told]
        conversations = [
            Said(each.prompt, text.text, bool(finished))
            for each, text, finished in zip(mine, texts, sampled.finished, strict=True)
        ]
        for name, model in self.models.items():
            scores = model(rows, prompt_lengths + num_tokens - 1, conversations)
            parts = [each | {name: float(score)} for each, score in zip(parts, scores, strict=True)]
        worth = weigh_steps(self.rewards, parts, num_tokens)
        is_safety = np.repeat([bool(each.prompt.row.get("is_safety")) for each in asked], samples)
        return Answered(
            rows=rows,
            logps=jax.make_array_from_process_local_data(
                self.feed.sharding, sampled.logps, (len(keys), sampled.logps.shape[1])
            ),
            prompt_lengths=prompt_lengths,
            num_tokens=num_tokens,
            finished=np.array([each["finished"] for each in told]),
            worth=worth,
            scores=combine(self.rewards, worth.parts, is_safety, self.combine),
            seconds=seconds,
        )

    def _texts(self, sampled: Samples) -> list[_Text]:
        return [
            _Text.of(self.encoder.tokenizer, tokens[:start].tolist(), sampled.answer(row), sampled.finished[row])
            for row, (tokens, start) in enumerate(zip(sampled.tokens, sampled.prompt_lengths, strict=True))
        ]

    def _judge(self, asked: Sequence[Asked], texts: Sequence[_Text], sampled: Samples) -> list[dict[str, Any]]:
        """Return what this process has to tell of each of its answers, as JSON values."""
        completions = [
            Completion(
                prompt=_last_message(each.prompt),
                response=text.text,
                reference=each.prompt.reference,
                row=each.prompt.row,
                num_tokens=text.num_tokens,
                finished=bool(finished),
            )
            for each, text, finished in zip(asked, texts, sampled.finished, strict=True)
        ]
        told = [
            {"prompt": int(start), "tokens": each.num_tokens, "finished": each.finished, "parts": {}}
            for start, each in zip(sampled.prompt_lengths, completions, strict=True)
        ]
        for name, function in self.functions.items():
            for each, text, reward in zip(told, texts, function(completions), strict=True):
                each["parts"][name] = _at_tokens(reward, text)
        return told


class _Text(NamedTuple):
    """The text of an answer, without its stop token.

    Attributes:
      ends: characters of the text that are complete after each token.
      num_tokens: with the stop token.
    """

    text: str
    ends: list[int]
    num_tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int], finished: bool) -> _Text:
        decoder = StreamDecoder(tokenizer, after=prompt)
        pieces = [decoder.push(token) for token in (answer[:-1] if finished else answer)]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return cls("".join(pieces) + decoder.finish(), ends, len(answer))

    def token_at(self, end: int) -> int:
        """Return the number of the token with which the first `end` characters are complete; 0 of an empty answer."""
        last = max(len(self.ends) - 1, 0)
        return next((number for number, length in enumerate(self.ends) if length >= end), last)


def _at_tokens(reward: Reward, text: _Text) -> float | list[tuple[int, float]]:
    if isinstance(reward, float):
        return reward
    return [(text.token_at(end), value) for end, value in reward]


def _steps(told: float | list[list[float]]) -> float | Steps:
    """Return what was told of steps as a mapping; those that end with the same token add up."""
    if not isinstance(told, list):
        return told
    steps: dict[int, float] = {}
    for end, value in told:
        steps[end] = steps.get(end, 0.0) + value
    return steps


def _last_message(prompt: Prompt) -> str:
    content = prompt.messages[-1]["content"]
    if not isinstance(content, str):
        raise InputError(f"{prompt.row['_origin']}: the last message of the prompt is no text")
    return content


def _by_row(told: Sequence[Sequence[tuple[int, dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Put what processes tell of rows in the order of the rows; of several that hold the same row the first counts."""
    rows: dict[int, dict[str, Any]] = {}
    for theirs in told:
        for row, each in theirs:
            rows.setdefault(row, each)
    return [rows[row] for row in range(len(rows))]
