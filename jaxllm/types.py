"""Pytrees that travel between rooms; no logic lives here."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

Params = dict[str, Any]
"""Nested dict of arrays, e.g. params["layers"]["attention"]["q"]["kernel"] [L, D, N, H]."""


class Batch(flax.struct.PyTreeNode):
    """One batch of token rows. Slots with segment id 0 are padding: nothing attends to them.

    Attributes:
      tokens: int32 [B, T].
      targets: int32 [B, T], the token each position predicts; None where nothing is trained.
      loss_weights: float32 [B, T], 0 where a position is not trained.
      positions: int32 [B, T], position within the document.
      segment_ids: int32 [B, T], 1, 2, ... for the documents packed into a row.
      mask: bool [B, T, T], True = the query (second to last axis) may attend to the key; overrides the causal rule.
      rope_length: int32 [B], length that length-dependent position rules see; None: T.
      block_positions: int32 [B, T], place within a block, for models with two positions; None: all zero.
      prefix_mask: bool [B, T], True = every query of the same document may attend to this key, later ones included.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    targets: jax.Array | None = None
    loss_weights: jax.Array | None = None
    mask: jax.Array | None = None
    rope_length: jax.Array | None = None
    block_positions: jax.Array | None = None
    prefix_mask: jax.Array | None = None

    @property
    def num_rows(self) -> int:
        """B."""
        return self.tokens.shape[0]


class PreferenceBatch(flax.struct.PyTreeNode):
    """Rows of pairs of answers: pair k is the segments 2k + 1 (chosen) and 2k + 2 (rejected), prompts included.

    Attributes:
      rows: the rows; loss_weights are 1 where a token of an answer is predicted.
      ends: int32 [B, K, 2], the slot of the last token of each answer; 0 where there is no pair.
      margins: float32 [B, K], how much better the chosen answer is.
      pair_weights: float32 [B, K], 0 where there is no pair.
      levels: int32 [B, K], how much better it is said to be, as a place in `data.example_rows.LEVELS`; -1 where nothing
        is said.
      ref_logps: float32 [B, K, 2], log-probabilities of the answers under the reference; None: not computed before.
    """

    rows: Batch
    ends: jax.Array
    margins: jax.Array
    pair_weights: jax.Array
    levels: jax.Array | None = None
    ref_logps: jax.Array | None = None

    @property
    def num_rows(self) -> int:
        """B."""
        return self.rows.num_rows


class RolloutBatch(flax.struct.PyTreeNode):
    """Sampled answers, one to a row; slot t is about the choice of token t + 1.

    Attributes:
      rows: prompts and answers; loss_weights are 1 where a token of an answer is predicted.
      old_logps: float32 [B, T], log-probabilities under the policy that the round began with.
      advantages: float32 [B, T].
      ref_logps: float32 [B, T], under the reference; None where the loss has no use for them.
      returns, old_values: float32 [B, T], for the value model; None without one.
      pretrain: texts whose loss is mixed in, or None.
    """

    rows: Batch
    old_logps: jax.Array
    advantages: jax.Array
    ref_logps: jax.Array | None = None
    returns: jax.Array | None = None
    old_values: jax.Array | None = None
    pretrain: Batch | None = None

    @property
    def num_rows(self) -> int:
        """B."""
        return self.rows.num_rows


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of past tokens, for all layers.

    Attributes:
      k, v: [L, B, S, K, H], keys as rotated when they were computed (unrotated where the position rule says so). With
        latent attention k holds the latents [L, B, S, 1, C] and v the shared rotated keys [L, B, S, 1, R].
      segment_ids: int32 [B, S], 0 = slot empty or padding.
      positions: int32 [B, S].
      index: int32 [], the slot that the next token is written to.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    index: jax.Array


class ModelOutput(flax.struct.PyTreeNode):
    """What a forward pass returns.

    Attributes:
      hidden: [B, T, D] after the final norm; with return_hidden [L+2, B, T, D]: the embedding, each block's
        output, and the final norm's.
      logits: float32 [B, T, V], or None where they were not asked for.
      cache: the updated KVCache, or None.
      aux: for mixtures of experts the layers' `nn.moe.Routing`, stacked over the mixture layers; else None.
    """

    hidden: jax.Array
    logits: jax.Array | None = None
    cache: KVCache | None = None
    aux: Any = None


class TrainState(flax.struct.PyTreeNode):
    """All that a training step reads and replaces.

    Attributes:
      step: int32 [], optimizer steps done.
      params: float32 master parameters: what is trained.
      opt_state: the optax state.
      rng: the run's random key, as raw key data uint32 [2].
      reference: parameters of a reference that moves during the run, shaped as `params`; None: there is none.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    rng: jax.Array
    reference: Params | None = None
