"""Answers to prompts, sampled with the run's own parameters, and what rewards say of them.

Every process knows all prompts of a round. It samples the answers whose rows its devices hold and judges them; what it
finds is told to all, so that statistics are the same everywhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.config.alignment import RewardConfig
from jaxllm.data.examples import Encoder
from jaxllm.data.rows import Prompt
from jaxllm.errors import InputError
from jaxllm.generate.rollout import Sampler, Samples, rollout_rows
from jaxllm.rewards import Completion, RewardFunction
from jaxllm.sharding.processes import gather, together
from jaxllm.tokenizers.base import StreamDecoder, Tokenizer
from jaxllm.train.feed import Feed, local_rows
from jaxllm.train.reward_sum import Steps, Worth, part_name, weigh_steps
from jaxllm.types import Batch, Params

ModelReward = Callable[["Answered", Sequence["Asked"]], np.ndarray]
"""Returns what a reward model says of R answers, float64 [R], the same in all processes."""


class Asked(NamedTuple):
    """A prompt: its number among all that are read, its ids, and what it was made from."""

    document: int
    ids: list[int]
    prompt: Prompt


@dataclasses.dataclass
class Answered:
    """R answers: G to each prompt, in rows after each other.

    Attributes:
      rows: prompts and answers on the mesh. logps: float32 [R, T], as they were sampled, as `rows` lie.
      mine: this process's part, and the numbers of its rows.
      prompt_lengths, lengths: int [R]; lengths with the answer and its stop token. finished: bool [R].
      worth: what the answers are worth.
      seconds: time of the sampling alone.
    """

    rows: Batch
    logps: jax.Array
    mine: Samples
    my_rows: list[int]
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    worth: Worth
    seconds: float

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each answer, int [R]."""
        return self.lengths - self.prompt_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Respondent:
    """Samples answers and has them judged.

    Attributes:
      functions: rewards by name that judge each answer for itself. models: those that run a model on all of them.
    """

    feed: Feed
    encoder: Encoder
    sampler: Sampler
    rewards: Sequence[RewardConfig]
    functions: Mapping[str, RewardFunction]
    models: Mapping[str, ModelReward] = dataclasses.field(default_factory=dict)

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
          keys: uint32 [R, 2], a random key for each answer. greedy, stop: as in `Sampler.sample`.

        Returns:
          the answers, or None if `stop` said so.

        Raises:
          InputError: a reward was refused, or the rows of a process are no whole groups.
        """
        my_rows = local_rows(self.feed.sharding, len(keys))
        samples = len(keys) // len(asked)
        mine = [asked[row // samples] for row in my_rows]
        # The models' inputs come from the step before: their time is not that of the sampling.
        jax.block_until_ready(params)
        began = time.monotonic()
        prompts = [each.ids for each in mine[::samples]]
        sampled = self.sampler.sample(params, adapter, prompts, keys[my_rows], greedy=greedy, stop=stop)
        if sampled is None:
            return None
        seconds = time.monotonic() - began
        told = _by_row(gather(list(zip(my_rows, together(lambda: self._judge(mine, sampled)), strict=True))))
        answered = Answered(
            rows=self.feed.to_devices(
                rollout_rows(sampled, self.encoder.places.spec, self.encoder.places.prefix_ids), len(keys)
            ),
            logps=jax.make_array_from_process_local_data(
                self.feed.sharding, sampled.logps, (len(keys), sampled.logps.shape[1])
            ),
            mine=sampled,
            my_rows=my_rows,
            prompt_lengths=np.array([each["prompt"] for each in told]),
            lengths=np.array([each["length"] for each in told]),
            finished=np.array([each["finished"] for each in told]),
            worth=Worth({}, None),
            seconds=seconds,
        )
        parts = [{name: _steps(value) for name, value in each["parts"].items()} for each in told]
        for name, model in self.models.items():
            for each, score in zip(parts, model(answered, asked), strict=True):
                each[name] = float(score)
        answered.worth = weigh_steps(self.rewards, parts, answered.num_tokens)
        return answered

    def _judge(self, asked: Sequence[Asked], sampled: Samples) -> list[dict[str, Any]]:
        """Return what this process has to tell of each of its answers, as JSON values."""
        answers = [
            _Text.of(self.encoder.tokenizer, each.ids, sampled.answer(row), bool(sampled.finished[row]))
            for row, each in enumerate(asked)
        ]
        completions = [
            Completion(
                prompt=_last_message(each.prompt),
                response=answer.text,
                reference=each.prompt.reference,
                row=each.prompt.row,
                num_tokens=answer.num_tokens,
                finished=bool(finished),
            )
            for each, answer, finished in zip(asked, answers, sampled.finished, strict=True)
        ]
        told = [
            {"prompt": int(start), "length": int(length), "finished": bool(finished), "parts": {}}
            for start, length, finished in zip(
                sampled.prompt_lengths, sampled.lengths, sampled.finished, strict=True
            )
        ]
        for name, function in self.functions.items():
            for each, answer, value in zip(told, answers, function(completions), strict=True):
                is_number = isinstance(value, float)
                each["parts"][name] = value if is_number else [(answer.token_at(end), step) for end, step in value]
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
        """Return the number of the token with which the first `end` characters are complete."""
        return next((number for number, length in enumerate(self.ends) if length >= end), len(self.ends) - 1)


def make_functions(rewards: Sequence[RewardConfig], make: Callable[[RewardConfig], RewardFunction]) -> dict:
    """Build the rewards that need no model, by name."""
    return {part_name(config): make(config) for config in rewards if config.kind != "model"}


def _last_message(prompt: Prompt) -> str:
    content = prompt.messages[-1]["content"]
    if not isinstance(content, str):
        raise InputError(f"{prompt.row['_origin']}: the last message of the prompt is no text")
    return content


def _steps(value: float | list[list[float]]) -> float | Steps:
    """Return what was told of steps as a mapping; steps that end with the same token are one."""
    if not isinstance(value, list):
        return value
    steps: dict[int, float] = {}
    for end, reward in value:
        steps[end] = steps.get(end, 0.0) + reward
    return steps


def _by_row(told: Sequence[Sequence[tuple[int, dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Put what processes tell of rows in the order of the rows; of several that hold the same row the first counts."""
    rows: dict[int, dict[str, Any]] = {}
    for theirs in told:
        for row, each in theirs:
            rows.setdefault(row, each)
    return [rows[row] for row in range(len(rows))]
