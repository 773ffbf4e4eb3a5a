"""What a chat format asks of a generation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.families import family_of_config
from jaxllm.generate.sampling import Sampling
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.chat import ChatFormat

_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")


def default_format(config: Mapping[str, Any] | None, tokenizer: Tokenizer) -> str | None:
    """Return the name of the format of a published model's family; of others ChatML, if the vocabulary has it."""
    tokens = tokenizer.special_tokens
    if config is not None:
        return family_of_config(config).chat(config, tokens)
    return "chatml" if {"<|im_start|>", "<|im_end|>"} <= set(tokens) else None


def prompt_ids(
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    """Return the ids of a conversation up to where the assistant begins to speak.

    Where the family drops the oldest rounds of a long conversation, so does this, with a warning.
    """
    if chat_format.history_window is not None:
        kept = chat_format.drop_history(tokenizer, messages, max_tokens=chat_format.history_window)
        if len(kept) < len(messages):
            warnings.warn(
                f"{len(messages) - len(kept)} of the oldest messages do not fit into the "
                f"{chat_format.history_window} tokens of history that {chat_format.name} keeps, and were left out",
                stacklevel=3,
            )
        messages = kept
    return chat_format.encode(tokenizer, messages, tools, add_generation_prompt=True).ids


def sampling_of(chat_format: ChatFormat, **chosen: Any) -> Sampling:
    """Return the family's sampling with what was chosen instead."""
    return Sampling(**{name: getattr(chat_format.sampling, name) for name in _FIELDS} | chosen)
