"""Loading models: published checkpoint folders, GGUF files, and runs of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import parse_dtype
from jaxllm.checkpoint.opened import Opened, open_published_model
from jaxllm.checkpoint.published import read_published
from jaxllm.config.alignment import ChatConfig
from jaxllm.data.encoders import find_chat_format
from jaxllm.data.examples import Encoder, Places
from jaxllm.data.token_rows import find_prefix_ids
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from jaxllm.reward_model import RewardModel
from jaxllm.spec import Rope, Rope2D
from jaxllm.train.run_models import SavedModel, find_model


def load_pretrained(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    special_ids: Mapping[str, int] | None = None,
    inv_freq_dtype: Literal["float32", "float16"] | None = None,
) -> LanguageModel:
    """Load a published checkpoint folder (config.json and safetensors).

    Args:
      dtype: "float32", "bfloat16" or "float16"; parameters and activations have it.
      mesh: a mesh from `jaxllm.sharding.mesh.make_mesh` to load straight onto.
      special_ids: ids of "mask", "gmask", "smask", "sop" and "eop" for GLM models whose folder has no tokenizer.
      inv_freq_dtype: precision of the rotary frequencies; default: as published (float16 for ChatGLM-6B and GLM-130B).

    Raises:
      InputError: unknown config keys or tensors, missing or mis-shaped tensors, unreadable files.
    """
    return _model(open_published_model(Path(path), dtype=parse_dtype(dtype), mesh=mesh), special_ids, inv_freq_dtype)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    special_ids: Mapping[str, int] | None = None,
) -> LanguageModel:
    """Load a run folder, one of its checkpoints, or a published checkpoint folder.

    Args:
      step: of a run, the checkpoint to load; default: the newest.
      dtype, mesh, special_ids: as in `load_pretrained`.

    Raises:
      InputError: nothing usable lies at `path`, or it is damaged.
    """
    return _model(open_model(path, step=step, dtype=parse_dtype(dtype), mesh=mesh), special_ids)


def load_reward_model(
    path: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    chat_format: str | None = None,
) -> RewardModel:
    """Load a run of stage reward, one of its checkpoints, or a published reward model (...ForSequenceClassification).

    Args:
      step, dtype, mesh: as in `load`.
      chat_format: a name in `tokenizers.chat.CHAT_FORMATS`; default: that of the run, or of the model's family.

    Raises:
      InputError: there is no reward model at `path`, or it is damaged.
    """
    found = find_model(path, step)
    found.require_score()
    tokenizer = found.tokenizer()
    if tokenizer is None:
        raise InputError(f"{path}: found no tokenizer; put its files into the model's folder")
    name = chat_format or found.chat_format(tokenizer)
    encoder = Encoder(
        tokenizer=tokenizer,
        chat=None if name is None else find_chat_format(name, tokenizer),
        options=ChatConfig(),
        places=Places(found.spec, find_prefix_ids(found.spec, None, {}, tokenizer)),
    )
    return RewardModel(found.spec, found.reward_model(mesh, parse_dtype(dtype)), encoder, end_id=found.end_id)


def open_model(
    path: str | Path, *, step: int | None = None, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
) -> Opened:
    """Load a published folder, a .gguf file, a run of any stage or one of its checkpoints; adapters are merged.

    Args:
      step: of a run, the checkpoint to load; default: the newest.
      dtype: of the parameters; None: the narrowest that holds the numbers as stored.

    Raises:
      InputError: nothing usable lies at `path`, or it is damaged.
    """
    found = find_model(path, step)
    if not isinstance(found, SavedModel):
        return open_published_model(found.path, dtype=dtype, mesh=mesh)
    config, source = read_published(found.run.path) or (None, None)
    tokenizer = found.tokenizer()
    chat = None if tokenizer is None else found.chat_format(tokenizer)
    rest = dict(config=config, source=source, tokenizer=tokenizer, path=found.run.path, chat=chat)
    if found.has_score:
        params = found.reward_model(mesh, dtype)
        return Opened(found.spec, params["model"], score=params["score"], **rest)
    params, adapter = found.model_and_prefix(mesh, dtype)
    return Opened(found.spec, params, adapter=adapter, **rest)


def _model(
    opened: Opened,
    special_ids: Mapping[str, int] | None = None,
    inv_freq_dtype: Literal["float32", "float16"] | None = None,
) -> LanguageModel:
    spec = opened.spec
    if opened.score is not None:
        raise InputError(
            f"{opened.path}: found a reward model, which gives scores and no text; jaxllm.load_reward_model reads it"
        )
    if inv_freq_dtype is not None:
        if not isinstance(spec.position, Rope | Rope2D):
            raise InputError("inv_freq_dtype is set, but the model has no rotary positions")
        spec = dataclasses.replace(spec, position=dataclasses.replace(spec.position, inv_freq_dtype=inv_freq_dtype))
    return LanguageModel(
        spec,
        opened.params,
        tokenizer=opened.tokenizer,
        config=opened.config,
        generation_config=opened.generation_config,
        special_ids=special_ids,
        source=opened.source,
        chat=opened.chat,
        adapter=opened.adapter,
    )
