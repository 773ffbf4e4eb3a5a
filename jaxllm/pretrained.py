"""Loading models: published checkpoint folders, GGUF files, and runs of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from jaxllm.checkpoint.formats import parse_dtype
from jaxllm.checkpoint.opened import Opened, open_model, open_published_model
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from jaxllm.spec import Rope, Rope2D


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


def _model(
    opened: Opened,
    special_ids: Mapping[str, int] | None = None,
    inv_freq_dtype: Literal["float32", "float16"] | None = None,
) -> LanguageModel:
    spec = opened.spec
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
    )
