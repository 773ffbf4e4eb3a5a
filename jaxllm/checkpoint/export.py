"""Export of models as published folders, in the layout of their own family or of another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.express import TARGETS, express_as
from jaxllm.checkpoint.formats import parse_json
from jaxllm.checkpoint.hf import has_vocabulary, save_checkpoint
from jaxllm.checkpoint.opened import Opened
from jaxllm.checkpoint.reward_folder import save_reward_folder
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.nn.adapter import Adapter
from jaxllm.tokenizers import Tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.tokenizers.export import tokenizer_config, tokenizer_json
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_KEPT = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION_KEYS = (
    *_SPECIAL_IDS,
    *("do_sample", "max_length", "max_new_tokens", "repetition_penalty", "temperature", "top_k", "top_p"),
)


def require_no_adapter(adapter: Adapter | None) -> None:
    """Raise InputError where something stands beside a model's weights that they cannot take in."""
    if adapter is not None:
        raise InputError("adapter.kind: a prefix cannot be merged into a model's weights; --adapter exports it alone")


def export_model(
    opened: Opened, output: str | Path, *, target: str | None = None, dtype: jnp.dtype | None = None
) -> tuple[str, ...]:
    """Write a model as a published folder, all or nothing.

    A model that was published comes back as it was, unless another target or dtype is asked for.

    Args:
      target: the family whose layout is wanted ("llama", "qwen2"); None: the model's own.
      dtype: of all tensors; None: as they were published, or as the run holds them.

    Returns:
      what the target's layout leaves out, a sentence each.

    Raises:
      InputError: the target cannot express the model, or `output` is not empty or cannot be written.
    """
    require_no_adapter(opened.adapter)
    if opened.score is not None:
        _export_reward_model(opened, Path(output), target, dtype)
        return ()
    notes, params = (), opened.params
    side_files = {} if opened.source is None else opened.source.side_files
    if target is None:
        spec, config, source = opened.spec, opened.config, opened.source
    else:
        expressed = express_as(target, opened.spec, params)
        spec, params, notes = expressed.spec, expressed.params, expressed.notes
        dtype = np.dtype(dtype or params["embedding"].dtype)
        ids = {name: opened.config[name] for name in _SPECIAL_IDS if (opened.config or {}).get(name) is not None}
        config, source = TARGETS[target].to_hf(spec) | ids | {"torch_dtype": dtype.name}, None
        side_files = _without_remote_code(side_files)
    if target is not None or not has_vocabulary(side_files):
        side_files = _generation_files(opened) | _chat_files(opened, side_files) | side_files
    side_files, tokenizer = with_vocabulary(side_files, opened.tokenizer)
    save_checkpoint(
        Path(output),
        spec,
        params,
        config=config,
        source=source,
        dtype=dtype,
        side_files=side_files,
        tokenizer=tokenizer,
    )
    return notes


def _export_reward_model(opened: Opened, output: Path, target: str | None, dtype: jnp.dtype | None) -> None:
    if target is not None:
        raise InputError(f"a reward model is written in the layout of its own family alone, found --as {target}")
    own = opened.tokenizer
    side_files, tokenizer = with_vocabulary({} if opened.source is None else opened.source.side_files, own)
    save_reward_folder(
        output,
        opened.spec,
        {"model": opened.params, "score": opened.score},
        config=opened.config,
        dtype=dtype,
        side_files=side_files,
        tokenizer=tokenizer,
        pad_id=None if own is None or own.pad_id == own.eos_id else own.pad_id,
    )


def _generation_files(opened: Opened) -> dict[str, bytes]:
    """Return the file that tells other programs where a text begins and ends, and a reply of a model that chats."""
    tokenizer = opened.tokenizer
    if tokenizer is None:
        return {}
    ids: dict[str, Any] = dict(zip(_SPECIAL_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))
    if opened.chat is not None:
        stops = (tokenizer.eos_id, *CHAT_FORMATS[opened.chat].stop_ids(tokenizer))
        stops = [token for token in dict.fromkeys(stops) if token is not None]
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return {_GENERATION: _json({name: token for name, token in ids.items() if token is not None})}


def _chat_files(opened: Opened, side_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the file that tells other programs how the model chats, unless it comes with one."""
    has_one = "chat_template" in parse_json(side_files.get(_TOKENIZER_CONFIG, b"{}"), _TOKENIZER_CONFIG)
    if opened.tokenizer is None or has_one:
        return {}
    name = opened.chat
    if name is None and opened.config is not None:
        name = family_of_config(opened.config).chat(opened.config, opened.tokenizer.special_tokens)
    return {} if name is None else {"chat_template.jinja": CHAT_FORMATS[name].jinja_template().encode()}


def with_vocabulary(
    side_files: Mapping[str, bytes], tokenizer: Tokenizer | None
) -> tuple[dict[str, bytes], Tokenizer | None]:
    """Return the files with those of the tokenizer, and the tokenizer where it is of a kind that saves itself."""
    if has_vocabulary(side_files):
        return dict(side_files), None
    if not isinstance(tokenizer, TiktokenBPE):
        return dict(side_files), tokenizer
    both = {"tokenizer.json": tokenizer_json(tokenizer), _TOKENIZER_CONFIG: tokenizer_config(tokenizer)}
    return dict(side_files) | {name: _json(content) for name, content in both.items()}, None


def _without_remote_code(side_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Keep what programs understand that know the target family alone: no code, and no keys that ask for code."""
    kept = {name: content for name, content in side_files.items() if name in _KEPT}
    if _TOKENIZER_CONFIG in side_files:
        config = parse_json(side_files[_TOKENIZER_CONFIG], _TOKENIZER_CONFIG)
        if config.pop("auto_map", None) is not None:
            config["tokenizer_class"] = "LlamaTokenizer"
        kept[_TOKENIZER_CONFIG] = _json(config)
    if _GENERATION in side_files:
        generation = parse_json(side_files[_GENERATION], _GENERATION)
        kept[_GENERATION] = _json({key: value for key, value in generation.items() if key in _GENERATION_KEYS})
    return kept


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
