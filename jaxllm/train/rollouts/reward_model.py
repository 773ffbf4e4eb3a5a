"""Rewards that a reward model gives: its score at the last token of each answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.config.alignment import ChatConfig
from jaxllm.data.example_rows import ExampleRows, Item
from jaxllm.data.examples import Tokens
from jaxllm.data.packing import stack_rows
from jaxllm.data.rows import Dialogue, Prompt, without_weight
from jaxllm.errors import InputError
from jaxllm.sharding.processes import gather, together
from jaxllm.tokenizers.chat import IGNORED
from jaxllm.train.feed import local_rows
from jaxllm.train.rollouts.microbatches import by_microbatches
from jaxllm.train.setup import Setup
from jaxllm.train.tuning import FullTuning
from jaxllm.train.tuning.headless import Headless, without_head
from jaxllm.train.weights import RunWeights
from jaxllm.types import Batch, Params


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
        spec = weights.reward_spec(path)
        if (spec.mask, spec.uses_block_positions) != (setup.spec.mask, setup.spec.uses_block_positions):
            raise InputError(f"rewards: {path} counts positions in another way than the policy; expected the same")
        if system is not None and setup.encoder.chat is None:
            raise InputError("rewards: a system message needs a chat format to write it; set chat.format")
        found = weights.reward_model(path)
        self._params = {"model": without_head(found["model"]), "score": found["score"]}
        self._forward = dataclasses.replace(
            setup.objective.forward, spec=spec, tuning=Headless(FullTuning(spec)), dropout=0.0, neftune_alpha=None
        )
        self._encoder = dataclasses.replace(setup.encoder, options=ChatConfig())
        self._setup, self._system = setup, system
        whole = NamedSharding(setup.mesh, PartitionSpec())
        self._score = jax.jit(self._at_ends, out_shardings=whole)

    def __call__(self, rows: Batch, ends: np.ndarray, conversations: Sequence[tuple[Prompt, str]]) -> np.ndarray:
        """Return the score of each of R answers, float64 [R]; all processes call this alike.

        Args:
          rows: prompts and answers on the mesh. ends: int [R], the slots of the last tokens.
          conversations: prompts and texts of this process's rows.
        """
        if self._system is not None:
            rows, ends = self._with_system(conversations, len(ends))
        else:
            rows = rows.replace(targets=None, loss_weights=None)
        return np.asarray(self._score(rows, ends.astype(np.int32), self._params), np.float64)

    def _at_ends(self, rows: Batch, ends: jax.Array, params: Params) -> jax.Array:
        def values(rows: Batch, params: Params) -> jax.Array:
            return self._forward.scores(params["model"], None, params["score"], rows, train=True)

        parts = self._setup.microbatches(rows.num_rows)
        scores = by_microbatches(values, parts)(rows, params)
        return jnp.take_along_axis(scores, ends[:, None], axis=1)[:, 0]

    def _with_system(self, conversations: Sequence[tuple[Prompt, str]], num_rows: int) -> tuple[Batch, np.ndarray]:
        """Write the conversations anew, with the system message and the token that ends an answer."""
        encoded = together(lambda: [self._encoded(prompt, text) for prompt, text in conversations])
        mine = [int(np.flatnonzero(tokens.labels != IGNORED)[-1]) for tokens in encoded]
        told = gather([local_rows(self._setup.feed.sharding, num_rows), mine])
        ends = dict(zip(*([x for theirs in told for x in theirs[part]] for part in (0, 1)), strict=True))
        # Few lengths, so that few programs are compiled.
        length = 1 << max(ends.values()).bit_length()
        empty = ExampleRows(places=self._encoder.places, packed=False)
        rows = []
        for tokens, end in zip(encoded, mine, strict=True):
            row = empty.empty_row(length)
            ids = Tokens(tokens.ids[: end + 1], tokens.labels[: end + 1])
            empty.place(row, Item(0, [ids]), 0, 0)
            rows.append({name: row[name] for name in row if name not in ("targets", "loss_weights", "document_ids")})
        return self._setup.feed.to_devices(stack_rows(rows), num_rows), np.array([ends[row] for row in range(num_rows)])

    def _encoded(self, prompt: Prompt, text: str) -> Tokens:
        rest = [message for message in without_weight(prompt.messages) if message["role"] != "system"]
        answer = {"role": "assistant", "content": text}
        return self._encoder.dialogue(
            Dialogue([{"role": "system", "content": self._system}, *rest, answer], prompt.tools)
        )
