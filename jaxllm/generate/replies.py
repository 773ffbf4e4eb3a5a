"""Replies to many conversations at once, each with its own random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.data.examples import Encoder
from jaxllm.data.rows import Prompt
from jaxllm.generate.rollout import Sampler
from jaxllm.tokenizers.base import decode_after
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replier:
    """A model with what it needs to chat.

    Attributes:
      params: of the whole model, on the sampler's mesh.
      sampler: samples answers that end with `encoder.stop_ids()`.
      most: tokens that a prompt may have.
    """

    params: Params
    encoder: Encoder
    sampler: Sampler
    most: int

    def fits(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether there is room for a reply; raises InputError where the chat format cannot express the messages."""
        return len(self._ids(messages)) <= self.most

    def reply(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        keys: np.ndarray,
        *,
        greedy: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> list[str | None] | None:
        """Return the text of the assistant's next message to each; None where it has no end, or is blank.

        Args:
          keys: uint32 [n, 2], one for each conversation, which decides its reply.
          greedy: take the likeliest tokens.
          stop: asked now and then; None is returned for all if it says so.
        """
        prompts = [self._ids(messages) for messages in conversations]
        samples = self.sampler.sample(self.params, None, prompts, keys, greedy=greedy, stop=stop)
        if samples is None:
            return None
        return [
            self._text(prompt, samples.answer(row), bool(samples.finished[row])) for row, prompt in enumerate(prompts)
        ]

    def _ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.encoder.prompt(Prompt(list(messages), None, {})).ids.tolist()

    def _text(self, prompt: Sequence[int], answer: Sequence[int], finished: bool) -> str | None:
        """Return what an answer says, without what ends it."""
        chat = self.encoder.chat
        text = decode_after(self.encoder.tokenizer, prompt, answer[:-1] if finished else answer)
        for end in () if chat is None else chat.stop_strings:
            text, found, _ = text.partition(end)
            finished |= bool(found)
        content = text if chat is None else chat.parse(text)["content"]
        return content if finished and content.strip() else None


def draw_keys(seed: int, numbers: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return uint32 [n, 2], a random key for each tuple of numbers, which with the seed decides it."""

    def draw(row: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        for number in row:
            key = jax.random.fold_in(key, number)
        return jax.random.key_data(key)

    return np.asarray(jax.vmap(draw)(np.array(numbers, np.uint32)))
