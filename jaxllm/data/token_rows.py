"""Rows of token ids as a caller gives them: checked, and with the positions that the reference derives from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxllm.data.prefix_layout import PrefixIds, derive_layout
from jaxllm.errors import InputError
from jaxllm.spec import LearnedBlock, ModelSpec, Rope, Rope2D
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.types import Batch


class RowLayout(NamedTuple):
    """Where each of S slots stands.

    Attributes:
      positions: int32 [B, S].
      block_positions: int32 [B, S], for models with two positions; else None.
      prefix_mask: bool [B, S], slots that all tokens of the row see; None for causal models.
    """

    positions: np.ndarray
    block_positions: np.ndarray | None
    prefix_mask: np.ndarray | None


_LARGEST_POSITION = 2**24
"""float32, in which rotations are computed, holds every integer up to here."""
_TOKENS = {
    "mask": ("[MASK]",),
    "gmask": ("[gMASK]",),
    "smask": ("[sMASK]",),
    "sop": ("<sop>", "sop", "<|startofpiece|>"),
    "eop": ("<eop>", "eop", "<|endofpiece|>"),
}
_CONFIG_KEYS = {"mask": "mask_token_id", "gmask": "gmask_token_id", "sop": "bos_token_id", "eop": "eos_token_id"}


def find_prefix_ids(
    spec: ModelSpec,
    special_ids: Mapping[str, int] | None,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> PrefixIds | None:
    """Find the special ids of a GLM model: as given, else in its config (ChatGLM-6B), else its tokenizer's.

    Args:
      special_ids: any of mask, gmask, smask, sop, eop.

    Raises:
      InputError: `special_ids` for a causal model, or with another name, an id outside the vocabulary, or one id twice.
    """
    if spec.mask == "causal":
        if special_ids:
            raise InputError("special_ids were given, but the positions of this model do not depend on any token")
        return None
    names = [field.name for field in dataclasses.fields(PrefixIds)]
    unknown = set(special_ids or {}) - set(names)
    if unknown:
        raise InputError(f"special_ids: unknown name {sorted(unknown)[0]!r}, expected {', '.join(names)}")
    given = list((special_ids or {}).values())
    if any(type(token) is not int or not 0 <= token < spec.vocab_size for token in given):
        raise InputError(f"special_ids must be ids from 0 to {spec.vocab_size - 1}, found {given}")
    if len(set(given)) < len(given):
        raise InputError(f"special_ids must differ from each other, found {given}")
    known: dict[str, int | None] = dict.fromkeys(names)
    if tokenizer is not None:
        for name, spellings in _TOKENS.items():
            found = [tokenizer.special_tokens[text] for text in spellings if text in tokenizer.special_tokens]
            known[name] = found[0] if found else None
    if "gmask_token_id" in config:
        known |= {name: config[key] for name, key in _CONFIG_KEYS.items() if config.get(key) is not None}
    known |= special_ids or {}
    return None if known["mask"] is None or known["sop"] is None else PrefixIds(**known)


def layout_of(
    spec: ModelSpec, ids: np.ndarray, valid: np.ndarray, prefix_ids: PrefixIds | None, num_slots: int | None = None
) -> RowLayout:
    """Derive positions and visible prefix from ids, as the reference implementation of the architecture does.

    Causal models count every slot, padding too: their rotary positions are relative, and LogN counts so.

    Args:
      ids: int [B, T]. valid: bool [B, T], False = padding.
      prefix_ids: special ids of a model whose prefix all tokens see.
      num_slots: S, with slots for tokens still to be generated; default: T.

    Raises:
      InputError: a prefix model without its special ids, or rows that break the rules of `derive_layout`.
    """
    if spec.mask == "causal":
        positions = np.arange(num_slots or ids.shape[1], dtype=np.int32)
        return RowLayout(np.broadcast_to(positions, (ids.shape[0], len(positions))), None, None)
    if prefix_ids is None:
        raise InputError(
            "this model's positions depend on its mask and <sop> tokens, whose ids are not known; load it with "
            "special_ids={'mask': ..., 'gmask': ..., 'smask': ..., 'sop': ..., 'eop': ...} or with its tokenizer, or "
            "give positions, block_positions and mask"
        )
    return RowLayout(
        *derive_layout(
            ids,
            valid,
            prefix_ids,
            block_positions=spec.uses_block_positions,
            # ChatGLM-6B's code looks for [gMASK] first; the code of the others allows one mask token.
            mask_rule="gmask_first" if isinstance(spec.position, Rope2D) else "only",
            num_slots=num_slots,
        )
    )


def batch_of(
    spec: ModelSpec,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    positions: np.ndarray | None = None,
    block_positions: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    prefix_ids: PrefixIds | None = None,
) -> Batch:
    """Return rows as a batch for evaluation; what is not given is derived as in `layout_of`.

    Args:
      input_ids: int [B, T]. attention_mask: 0 = padding. positions, block_positions: int [B, T].
      mask: bool [B, T, T], True = may attend.

    Raises:
      InputError: ids outside the vocabulary, shapes that disagree, positions that cannot be derived or are beyond a
        learned table.
    """
    ids = checked_ids(spec, input_ids)
    valid = checked_attention_mask(attention_mask, ids.shape)
    positions = _checked_places("positions", positions, ids.shape)
    block_positions = _checked_places("block_positions", block_positions, ids.shape)
    if mask is not None:
        mask = np.asarray(mask)
        require_shape("mask", mask, (*ids.shape, ids.shape[1]))
        if not np.isin(mask, (0, 1)).all():
            raise InputError("mask must hold True where a query may attend, and False elsewhere")
    if block_positions is not None and not spec.uses_block_positions:
        raise InputError("block_positions were given, but this model has one position for each token")
    layout = RowLayout(positions, block_positions, None)
    needs_blocks = spec.uses_block_positions and block_positions is None
    if positions is None or needs_blocks or (mask is None and spec.mask == "prefix"):
        derived = layout_of(spec, ids, valid, prefix_ids)
        layout = RowLayout(*(found if given is None else given for given, found in zip(layout, derived, strict=True)))
    check_positions(spec, layout)
    lengths = valid.sum(axis=1) if spec.rope_length_by_row else np.full(len(ids), ids.shape[1])
    return Batch(
        tokens=jnp.asarray(ids),
        positions=jnp.asarray(layout.positions, jnp.int32),
        segment_ids=jnp.asarray(valid),
        mask=None if mask is None else jnp.asarray(mask, bool),
        rope_length=jnp.asarray(lengths, jnp.int32),
        block_positions=None if layout.block_positions is None else jnp.asarray(layout.block_positions, jnp.int32),
        prefix_mask=None if layout.prefix_mask is None else jnp.asarray(layout.prefix_mask, bool),
    )


def check_positions(spec: ModelSpec, layout: RowLayout) -> None:
    """Raise InputError for a position beyond the model's table, learned or of rotations, where it has one."""
    if isinstance(spec.position, LearnedBlock):
        most = spec.position.num_positions - 1
    elif isinstance(spec.position, Rope) and spec.position.table_length is not None:
        most = spec.position.table_length - 1
    else:
        return
    for name, places in (("positions", layout.positions), ("block_positions", layout.block_positions)):
        if places is not None and (places.max() > most or places.min() < 0):
            raise InputError(f"{name} reach from {places.min()} to {places.max()}; the model has 0 to {most}")


def _checked_places(name: str, places: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if places is None:
        return None
    places = np.asarray(places)
    require_shape(name, places, shape)
    if not np.issubdtype(places.dtype, np.integer):
        raise InputError(f"{name} must be integers, found {places.dtype}")
    if np.abs(places).max() > _LARGEST_POSITION:
        raise InputError(f"{name} must be at most {_LARGEST_POSITION:,}, found {np.abs(places).max():,}")
    return places


def checked_ids(spec: ModelSpec, input_ids: np.ndarray) -> np.ndarray:
    """Return ids as int32 [B, T].

    Raises:
      InputError: not integers of that shape, or outside the vocabulary.
    """
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:
        raise InputError(
            "input_ids must be integers [B, T], found rows of different lengths; pad them and give an attention_mask"
        ) from error
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids must be integers [B, T], found {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= spec.vocab_size:
        raise InputError(f"input_ids reach from {ids.min()} to {ids.max()}; the vocabulary has {spec.vocab_size}")
    return ids.astype(np.int32)


def checked_attention_mask(attention_mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return int32 [B, T], 1 where a token is valid; None means everywhere.

    Raises:
      InputError: another shape, or other values than 0 and 1.
    """
    if attention_mask is None:
        return np.ones(shape, np.int32)
    valid = np.asarray(attention_mask)
    require_shape("attention_mask", valid, shape)
    if not np.isin(valid, (0, 1)).all():
        raise InputError(f"attention_mask must hold 1, and 0 for padding, found {valid[~np.isin(valid, (0, 1))][0]}")
    return valid.astype(np.int32)


def require_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise InputError for an argument of another shape."""
    if np.shape(array) != shape:
        raise InputError(f"{name} must have shape {shape}, found {np.shape(array)}")


def pad_left(ids: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the padding on the right of each row to its left: new tokens follow the last valid one."""
    shifts = [int(np.argmax(row[::-1] != 0)) for row in valid]
    shifted = [(np.roll(row, shift), np.roll(mask, shift)) for row, mask, shift in zip(ids, valid, shifts, strict=True)]
    return np.stack([row for row, _ in shifted]), np.stack([mask for _, mask in shifted])
