"""Ids between texts: what opens a document, what ends a text, and what fills rows that ended before others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.tokenizers import Tokenizer


def start_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that open a document; raises InputError where the vocabulary has none."""
    around = (*tokenizer.prefix_ids, *tokenizer.suffix_ids)
    if around:
        return around
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start is None:
        raise InputError("the tokenizer has neither a beginning- nor an end-of-text token to start a document with")
    return (start,)


def given_stop_ids(eos_ids: Any) -> list[int]:
    """Return the stop ids that a caller gives; raises InputError for anything but a sequence of ids."""
    if not isinstance(eos_ids, Iterable) or not all(isinstance(token, int | np.integer) for token in eos_ids):
        raise InputError(f"eos_ids must be a sequence of ids, found {eos_ids!r}")
    return [int(token) for token in eos_ids]


def published_stop_ids(published: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids that end a text of a published model, else its tokenizer's.

    Args:
      published: the raw generation_config.json, over config.json.

    Raises:
      InputError: what was published is no id and no list of ids.
    """
    found = published.get("eos_token_id")
    for token in found if isinstance(found, list) else [found]:
        if token is not None and type(token) is not int:
            raise InputError(f"generation_config.json: eos_token_id = {found!r}, expected an id or a list of ids")
    if found is None:
        own = None if tokenizer is None else tokenizer.eos_id
        return [] if own is None else [own]
    return list(found) if isinstance(found, list) else [found]


def pad_id(published: Mapping[str, Any], tokenizer: Tokenizer | None, stop_ids: Sequence[int]) -> int:
    """Return the id that fills rows after their end: as published, else the tokenizer's, else what ended them."""
    own = None if tokenizer is None else tokenizer.pad_id
    for candidate in (published.get("pad_token_id"), own, *stop_ids):
        if candidate is not None and candidate >= 0:  # the first LLaMA conversions say -1
            return candidate
    return 0
