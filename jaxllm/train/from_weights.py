"""What a configuration may leave to the weights that a run starts from: the tokenizer and the chat format."""

from __future__ import annotations

from jaxllm.checkpoint.opened import open_tokenizer
from jaxllm.config import RunConfig
from jaxllm.data.encoders import default_chat_format, fitting_chat_format
from jaxllm.errors import InputError
from jaxllm.tokenizers import Tokenizer
from jaxllm.train.run_models import starting_model


def run_tokenizer(config: RunConfig) -> Tokenizer:
    """Return the tokenizer that a run is configured with, by default that of its weights.

    Raises:
      InputError: there is none, or it is faulty.
    """
    if config.tokenizer is not None:
        return open_tokenizer(config.tokenizer)
    found = starting_model(config).tokenizer()
    if found is None:
        raise InputError(f"tokenizer: missing, and none lies with model.weights {config.model.weights}")
    return found


def run_chat_format(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Return the name of the format of a run's conversations: as given, of its weights, or of its model's family.

    None means that there is no format, and prompts and answers are plain text.

    Raises:
      InputError: it is not given, and the weights that know it are not there.
    """
    if config.chat.format is not None:
        return config.chat.format
    found = starting_model(config)
    if found is None:
        return default_chat_format(config.model.name, tokenizer)
    return fitting_chat_format(found.chat_format(tokenizer), tokenizer)
