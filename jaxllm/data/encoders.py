"""The encoder of a run: which chat format its examples are written in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.config.schema import RunConfig
from jaxllm.data.examples import Encoder, Places
from jaxllm.data.token_rows import find_prefix_ids
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES, family_of_config
from jaxllm.families.base import Family
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS, ChatFormat, Special


def make_encoder(config: RunConfig, spec: ModelSpec, tokenizer: Tokenizer, chat_format: str | None) -> Encoder:
    """Return how the rows of a run become ids and labels.

    Args:
      chat_format: a name in CHAT_FORMATS; None: prompts and answers are plain text.

    Raises:
      InputError: the chat format is unknown or its special tokens are not in the vocabulary, or the family has
        published no labels, or the special tokens of a prefix model are unknown.
    """
    chat = None if chat_format is None else find_chat_format(chat_format, tokenizer)
    if config.chat.labels == "published" and (chat is None or not chat.has_published_labels):
        raise InputError(
            f"chat.labels: found 'published', but the chat format {chat_format} has no labels of its family's own; "
            "expected 'assistant'"
        )
    prefix_ids = find_prefix_ids(spec, None, {}, tokenizer)
    if prefix_ids is None and (published := _published_config(config.model.name)):
        prefix_ids = find_prefix_ids(spec, None, published[1], tokenizer)
    if spec.mask == "prefix" and prefix_ids is None:
        raise InputError(f"tokenizer: found no mask token and <sop>, on which positions of {config.model.label} depend")
    return Encoder(tokenizer=tokenizer, chat=chat, options=config.chat, places=Places(spec, prefix_ids))


def find_chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """Return a chat format by name; raises InputError where there is none or the tokenizer lacks its stop tokens."""
    if name not in CHAT_FORMATS:
        raise InputError(f"chat.format: found {name!r}, expected one of {', '.join(CHAT_FORMATS)}")
    CHAT_FORMATS[name].stop_ids(tokenizer)
    return CHAT_FORMATS[name]


def default_chat_format(model_name: str | None, tokenizer: Tokenizer) -> str | None:
    """Return the name of the format of a model's family, or of ChatML, whichever the vocabulary has the tokens for."""
    published = _published_config(model_name)
    own = None if published is None else published[0].chat(published[1], tokenizer.special_tokens)
    return fitting_chat_format(own, tokenizer)


def fitting_chat_format(own: str | None, tokenizer: Tokenizer) -> str | None:
    """Return the name of a model's own format, else of ChatML, whichever the vocabulary has the tokens for."""
    for name in (own, "chatml"):
        if name is not None and all(_has(tokenizer, token) for token in CHAT_FORMATS[name].stop_tokens):
            return name
    return None


def _has(tokenizer: Tokenizer, token: Special) -> bool:
    return token.text in tokenizer.special_tokens if token.id is None else token.id < tokenizer.vocab_size


def _published_config(model_name: str | None) -> tuple[Family, dict[str, Any]] | None:
    """Return family and published config of a size's name or of a path to a config.json; None for all others."""
    if model_name is None:
        return None
    for family in FAMILIES:
        if model_name in family.sizes:
            return family, family.spec_to_hf(family.sizes[model_name])
    path = Path(model_name)
    found = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" and path.is_file() else {}
    return (family_of_config(found, model_name), found) if "architectures" in found else None
