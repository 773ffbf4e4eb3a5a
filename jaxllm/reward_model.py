"""RewardModel: a model that says how good an answer is, as users hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.example_rows import ExampleRows, Item
from jaxllm.data.examples import Encoder, Tokens
from jaxllm.data.packing import stack_rows
from jaxllm.data.rows import Dialogue, Text
from jaxllm.errors import InputError
from jaxllm.nn import score
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.model import apply
from jaxllm.spec import ModelSpec
from jaxllm.types import Batch, Params

Conversation = Sequence[Mapping[str, Any]]

# Rows are padded to a multiple of this, so that few shapes are compiled.
_LENGTHS = 64


class RewardModel:
    """A reward model with its tokenizer.

    Attributes:
      spec: the architecture below the head.
      params: {"model", "score": {"kernel": [D]}}; parameter dtype = compute dtype.
      encoder: writes conversations as tokens.
      end_id: a token that follows whole conversations, at which they are scored; None: scores are read at the token
        that ends the last answer.
      attention_impl: what computes attention, see `nn.model.apply`; it may be set.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        encoder: Encoder,
        *,
        end_id: int | None = None,
        attention_impl: AttentionImpl | None = None,
    ):
        self.spec = spec
        self.params = params
        self.encoder = encoder
        self.end_id = end_id
        self.attention_impl = attention_impl
        self._score = jax.jit(self._values)

    def score(self, items: Sequence[str | Conversation], *, batch_size: int = 8) -> np.ndarray:
        """Return the score of each conversation or text, float32 [n].

        Args:
          items: conversations as in OpenAI's API, scored at the token that ends the assistant's last message; texts
            are scored at the token that ends them.

        Raises:
          InputError: a conversation without a last message of the assistant, or one that the chat format cannot
            express; more tokens than the model has positions.
        """
        if isinstance(items, str) or any(isinstance(item, Mapping) for item in items):
            raise InputError("score takes a sequence of texts or conversations, found one; pass [it]")
        encoded = [self._encoded(item, f"items[{number}]") for number, item in enumerate(items)]
        scores = np.zeros(len(encoded), np.float32)
        # Rows of like length together: the least padding.
        order = sorted(range(len(encoded)), key=lambda number: len(encoded[number].ids))
        for chosen in _cut(order, batch_size):
            rows, ends = self._rows([encoded[number] for number in chosen], batch_size)
            scores[chosen] = np.asarray(self._score(self.params, rows, ends), np.float32)[: len(chosen)]
        return scores

    def _values(self, params: Params, rows: Batch, ends: jax.Array) -> jax.Array:
        output = apply(self.spec, params["model"], rows, attention_impl=self.attention_impl, return_logits=False)
        values = score.evaluate(params["score"], output.hidden)
        return jnp.take_along_axis(values, ends[:, None], axis=1)[:, 0]

    def _encoded(self, item: str | Conversation, where: str) -> Tokens:
        most = self.spec.max_position_embeddings
        try:
            if isinstance(item, str):
                (tokens,) = self.encoder.text(Text(item), most)
            else:
                tokens = self.encoder.scored(Dialogue(_answered(item)), end_id=self.end_id)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        if len(tokens.ids) > most:
            raise InputError(f"{where}: found {len(tokens.ids)} tokens, but the model has {most} positions")
        return tokens

    def _rows(self, examples: Sequence[Tokens], batch_size: int) -> tuple[Batch, np.ndarray]:
        """Return examples as rows of padded length, filled up with rows of padding, and their last slots."""
        rule = ExampleRows(places=self.encoder.places, packed=False)
        longest = max(len(tokens.ids) for tokens in examples)
        length = min(-(-longest // _LENGTHS) * _LENGTHS, self.spec.max_position_embeddings)
        rows = [rule.empty_row(length) for _ in range(batch_size)]
        for row, tokens in zip(rows, examples, strict=False):
            rule.place(row, Item(0, [tokens]), 0, 0)
        fields = stack_rows(rows)
        for name in ("targets", "loss_weights", "document_ids"):
            del fields[name]
        ends = [len(tokens.ids) - 1 for tokens in examples] + [0] * (batch_size - len(examples))
        lengths = np.array([len(tokens.ids) for tokens in examples] + [1] * (batch_size - len(examples)), np.int32)
        return Batch(**fields, rope_length=lengths), np.array(ends, np.int32)


def _answered(conversation: Conversation) -> list[dict[str, Any]]:
    messages = [dict(message) for message in conversation]
    if not messages or messages[-1].get("role") != "assistant":
        found = messages[-1].get("role") if messages else "no message"
        raise InputError(f"the last message is of {found!r}; expected the assistant's, which is scored")
    return messages


def _cut(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(order), size):
        yield list(order[begin : begin + size])
