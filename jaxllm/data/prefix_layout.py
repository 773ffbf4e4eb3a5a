"""Positions and visible context of GLM prompts, derived from their ids.

A prompt is a context with a mask token in it, `<sop>`, and what fills the mask. The context is seen from everywhere,
what follows `<sop>` is causal, and its positions point at the mask token (THUDM/GLM, THUDM/GLM-130B, ChatGLM-6B).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from jaxllm.errors import InputError

MaskRule = Literal["only", "gmask_first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixIds:
    """Ids of the special tokens of a GLM vocabulary; None where it has no such token.

    Attributes:
      mask, smask, gmask: stand for a missing span, missing sentences, and a missing rest.
      sop, eop: open and close what fills a mask.
    """

    mask: int
    gmask: int | None
    smask: int | None
    sop: int
    eop: int | None

    @property
    def masks(self) -> tuple[int, ...]:
        """The ids of all mask tokens."""
        return tuple(id for id in (self.mask, self.gmask, self.smask) if id is not None)


class PrefixLayout(NamedTuple):
    """Where each slot stands; padding has position 0.

    Attributes:
      positions: int32 [B, S].
      block_positions: int32 [B, S], 0 in the context, 1 at `<sop>`, then 2, 3, ...; None for models without them.
      prefix_mask: bool [B, S], True in the context.
    """

    positions: np.ndarray
    block_positions: np.ndarray | None
    prefix_mask: np.ndarray


def derive_layout(
    tokens: np.ndarray,
    valid: np.ndarray,
    ids: PrefixIds,
    *,
    block_positions: bool,
    mask_rule: MaskRule = "only",
    num_slots: int | None = None,
) -> PrefixLayout:
    """Derive the layout of prompts that are padded on either side.

    Args:
      tokens: int [B, T].
      valid: bool [B, T], False = padding.
      block_positions: True: from `<sop>` on the position stays that of the mask token and the block position counts
        (GLM, ChatGLM-6B). False: it stays there without block positions, and after [gMASK] goes on counting (GLM-130B).
      mask_rule: which mask token is filled. "only": the context must hold exactly one (GLM, GLM-130B); "gmask_first":
        the first [gMASK], or where there is none the first [MASK] (ChatGLM-6B's model code).
      num_slots: S >= T; slots beyond T are for tokens still to be generated. Default: T.

    Raises:
      InputError: a row without `<sop>`, without a mask token before it, or with more of them than the rule allows.
    """
    valid = np.asarray(valid, bool)
    is_sop = (tokens == ids.sop) & valid
    _require(is_sop.any(axis=1), f"has no <sop> (id {ids.sop})")
    slots = np.arange(tokens.shape[1])
    context = valid & (slots < is_sop.argmax(axis=1)[:, None])
    mask_slot = _mask_slots(tokens, context, ids, mask_rule)

    extra = (num_slots or tokens.shape[1]) - tokens.shape[1]
    context = np.pad(context, ((0, 0), (0, extra)))
    valid = np.pad(valid, ((0, 0), (0, extra)), constant_values=True)
    place = np.cumsum(valid, axis=1) - 1
    filling = valid & ~context
    mask_place = np.take_along_axis(place, mask_slot, axis=1)
    counts_on = np.zeros_like(mask_place, bool)
    if not block_positions:
        counts_on = np.take_along_axis(tokens, mask_slot, axis=1) == ids.gmask
    positions = np.where(filling & ~counts_on, mask_place, np.where(valid, place, 0))
    blocks = np.where(filling, place - context.sum(axis=1, keepdims=True) + 1, 0)
    return PrefixLayout(positions.astype(np.int32), blocks.astype(np.int32) if block_positions else None, context)


def _mask_slots(tokens: np.ndarray, context: np.ndarray, ids: PrefixIds, rule: MaskRule) -> np.ndarray:
    """Return the slot of the mask token that each row fills, int [B, 1]."""
    if rule == "gmask_first":
        is_gmask, is_mask = context & (tokens == ids.gmask), context & (tokens == ids.mask)
        is_mask = np.where(is_gmask.any(axis=1, keepdims=True), is_gmask, is_mask)
    else:
        is_mask = context & np.isin(tokens, ids.masks)
        several = "has several mask tokens before <sop>; give positions, block_positions and mask explicitly"
        _require(is_mask.sum(axis=1) <= 1, several)
    _require(is_mask.any(axis=1), f"has no mask token (ids {', '.join(map(str, ids.masks))}) before <sop>")
    return is_mask.argmax(axis=1)[:, None]


def _require(holds: np.ndarray, problem: str) -> None:
    if not holds.all():
        raise InputError(f"input_ids: row {holds.argmin()} {problem}")
