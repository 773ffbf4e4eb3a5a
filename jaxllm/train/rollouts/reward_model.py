"""Rewards that a reward model gives: its score at the last token of each answer.

It reads the policy's own tokens. Where it is to read something else, a system message or a token that follows whole
conversations, these are written anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.alignment import ChatConfig
from jaxllm.data.encoders import find_chat_format
from jaxllm.data.example_rows import ExampleRows, Item
from jaxllm.data.examples import Encoder, Tokens, located
from jaxllm.data.packing import stack_rows
from jaxllm.data.rows import Dialogue, Prompt
from jaxllm.errors import InputError
from jaxllm.sharding.processes import gather, together
from jaxllm.sharding.rules import replicated
from jaxllm.train.feed import local_rows
from jaxllm.train.found_model import FoundModel
from jaxllm.train.rollouts.microbatches import by_microbatches
from jaxllm.train.setup import Setup
from jaxllm.train.tuning import FullTuning
from jaxllm.train.tuning.headless import Headless, without_head
from jaxllm.train.weights import RunWeights
from jaxllm.types import Batch, Params


class Said(NamedTuple):
    """An answer to a prompt; finished: it has a stop token, which is no part of the text."""

    prompt: Prompt
    answer: str
    finished: bool


class ModelReward:
    """A reward model that scores the answers of a round, microbatch by microbatch."""

    def __init__(self, setup: Setup, weights: RunWeights, path: str, system: str | None):
        """Read the model onto the mesh.

        Args:
          path: of a run, checkpoint or folder with a reward model. system: system message that it reads in place of
            the prompts' own; None: it reads what the policy read and wrote.

        Raises:
          InputError: there is none at `path`, or one that reads other ids than the policy.
        """
        found = weights.find(path)
        found.require_score()
        spec = found.spec
        if (spec.mask, spec.uses_block_positions) != (setup.spec.mask, setup.spec.uses_block_positions):
            raise InputError(f"rewards: {path} counts positions in another way than the policy; expected the same")
        if system is not None and setup.encoder.chat is None:
            raise InputError("rewards: a system message needs a chat format to write it; set chat.format")
        self._setup, self._system, self._end_id = setup, system, found.end_id
        self._encoder = dataclasses.replace(setup.encoder, options=ChatConfig())
        if self._end_id is None:
            params = weights.reward_model(path)
        else:
            # It reads texts, with a tokenizer of its own.
            params = found.reward_model(setup.mesh)
            self._encoder = self._own_encoder(found)
        if self._writes_anew:
            with located(f"rewards: {path}"):
                self._encoded(Said(Prompt([{"role": "user", "content": "?"}], None, {}), "!", True))
        self._params = {"model": without_head(params["model"]), "score": params["score"]}
        self._forward = dataclasses.replace(
            setup.objective.forward, spec=spec, tuning=Headless(FullTuning(spec)), dropout=0.0, neftune_alpha=None
        )
        self._score = jax.jit(self._at_ends, out_shardings=replicated(setup.mesh))

    def __call__(self, rows: Batch, ends: np.ndarray, conversations: Sequence[Said]) -> np.ndarray:
        """Return the score of each of R answers, float64 [R]; all processes call this alike.

        Args:
          rows: prompts and answers on the mesh. ends: int [R], the slots of the last tokens.
          conversations: of this process's rows.
        """
        if self._writes_anew:
            rows, ends = self._written_anew(conversations, len(ends))
        else:
            rows = rows.replace(targets=None, loss_weights=None)
        return np.asarray(self._score(rows, ends.astype(np.int32), self._params), np.float64)

    @property
    def _writes_anew(self) -> bool:
        return self._system is not None or self._end_id is not None

    def _at_ends(self, rows: Batch, ends: jax.Array, params: Params) -> jax.Array:
        def values(rows: Batch, params: Params) -> jax.Array:
            return self._forward.scores(params["model"], None, params["score"], rows, train=True)

        parts = self._setup.microbatches(rows.num_rows)
        scores = by_microbatches(values, parts)(rows, params)
        return jnp.take_along_axis(scores, ends[:, None], axis=1)[:, 0]

    def _own_encoder(self, found: FoundModel) -> Encoder:
        """Return how a model that reads texts writes them."""
        tokenizer = found.tokenizer() or self._setup.tokenizer
        name = found.chat_format(tokenizer)
        if name is None:
            raise InputError(f"rewards: {found.path} has no chat format in which its conversations could be written")
        places = dataclasses.replace(self._encoder.places, spec=found.spec)
        return Encoder(tokenizer=tokenizer, chat=find_chat_format(name, tokenizer), options=ChatConfig(), places=places)

    def _written_anew(self, conversations: Sequence[Said], num_rows: int) -> tuple[Batch, np.ndarray]:
        """Return rows of conversations as the model wants them, and the slots of their last tokens."""
        encoded = together(lambda: [self._encoded(said) for said in conversations])
        mine = [len(tokens.ids) - 1 for tokens in encoded]
        told = gather([local_rows(self._setup.feed.sharding, num_rows), mine])
        ends = dict(zip(*([x for theirs in told for x in theirs[part]] for part in (0, 1)), strict=True))
        # Few lengths, so that few programs are compiled.
        length = 1 << max(ends.values()).bit_length()
        empty = ExampleRows(places=self._encoder.places, packed=False)
        rows = []
        for tokens in encoded:
            row = empty.empty_row(length)
            empty.place(row, Item(0, [tokens]), 0, 0)
            rows.append({name: row[name] for name in row if name not in ("targets", "loss_weights", "document_ids")})
        return self._setup.feed.to_devices(stack_rows(rows), num_rows), np.array([ends[row] for row in range(num_rows)])

    def _encoded(self, said: Said) -> Tokens:
        messages = list(said.prompt.messages)
        if self._system is not None:
            rest = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": self._system}, *rest]
        dialogue = Dialogue([*messages, {"role": "assistant", "content": said.answer}], said.prompt.tools)
        return self._encoder.scored(dialogue, end_id=self._end_id, finished=said.finished)
