"""Sampled answers as arrays on the host, and as rows to train on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.token_rows import RowLayout, layout_of
from jaxllm.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Samples:
    """Prompts with an answer each, of one process, in the order of the keys they were drawn with.

    Attributes:
      tokens: int32 [n, T], prompt and answer from slot 0 on, then 0.
      prompt_lengths: int32 [n]. lengths: int32 [n], with the answer and its stop token.
      finished: bool [n], whether the answer ends with a stop token; else it has max_new_tokens.
      logps: float32 [n, T]: slot t holds the log-probability of token t + 1 of the answer at the sampling temperature,
        before top-k and top-p; 0 elsewhere.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    logps: np.ndarray

    def answer(self, row: int) -> list[int]:
        """Return the ids of one answer, its stop token included."""
        return self.tokens[row, self.prompt_lengths[row] : self.lengths[row]].tolist()


def compact(
    tokens: np.ndarray,
    logps: np.ndarray,
    generated: slice,
    prompt_lengths: np.ndarray,
    *,
    eos_ids: np.ndarray,
    seq_len: int,
) -> Samples:
    """Move rows that are padded on the left to the first of `seq_len` slots, and find out where their answers end.

    Args:
      tokens: int32 [n, S], prompts and answers; generated: the slots of all answers. logps: float32 [n, N], of the
        first N tokens of each answer. prompt_lengths: int32 [n].
    """
    stops = np.isin(tokens[:, generated], eos_ids)
    finished = stops.any(axis=1)
    num_new = np.where(finished, stops.argmax(axis=1) + 1, stops.shape[1]).astype(np.int32)
    lengths = prompt_lengths + num_new
    slots = np.arange(seq_len)[None]
    sources = slots + (generated.start - prompt_lengths)[:, None]
    choices = slots - prompt_lengths[:, None] + 1  # the number of the token that each slot predicts
    moved = np.take_along_axis(tokens, np.minimum(sources, tokens.shape[1] - 1), axis=1)
    chosen = np.take_along_axis(logps, np.clip(choices, 0, logps.shape[1] - 1), axis=1)
    return Samples(
        tokens=np.where(slots < lengths[:, None], moved, 0),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        finished=finished,
        logps=np.where((choices >= 0) & (choices < num_new[:, None]), chosen, 0).astype(np.float32),
    )


def joined(parts: Sequence[Samples]) -> Samples:
    """Return the rows of several Samples one after another."""
    names = [field.name for field in dataclasses.fields(Samples)]
    return Samples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def rollout_rows(samples: Samples, spec: ModelSpec, prefix_ids: PrefixIds | None = None) -> dict[str, np.ndarray]:
    """Lay samples out as rows of a Batch, one answer a row, of which the answer's tokens are trained.

    Returns:
      arrays [n, T]: tokens, targets, loss_weights, positions, segment_ids, and of prefix models prefix_mask and, where
      they have them, block_positions.

    Raises:
      InputError: positions that cannot be derived.
    """
    tokens, slots = samples.tokens, np.arange(samples.tokens.shape[1])[None]
    valid = slots < samples.lengths[:, None]
    trained = (slots >= samples.prompt_lengths[:, None] - 1) & (slots < samples.lengths[:, None] - 1)
    if spec.mask == "prefix":
        layout = layout_of(spec, tokens, valid, prefix_ids)
    else:
        layout = RowLayout(np.where(valid, slots, 0), None, None)
    rows = {
        "tokens": tokens,
        "targets": np.where(slots < samples.lengths[:, None] - 1, np.roll(tokens, -1, axis=1), 0),
        "loss_weights": trained.astype(np.float32),
        "segment_ids": valid.astype(np.int32),
        **layout._asdict(),
    }
    rows["positions"] = rows["positions"].astype(np.int32)
    return {name: array for name, array in rows.items() if array is not None}
