"""Loading models: published checkpoint folders, GGUF files, and runs of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from jaxllm.checkpoint.hf import load_checkpoint, read_json
from jaxllm.checkpoint.reader import open_checkpoint
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.language_model import LanguageModel, parse_dtype
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import Rope, Rope2D, spec_from_json
from jaxllm.tokenizers import find_tokenizer


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
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    spec, params, config, source = load_checkpoint(folder, dtype=parse_dtype(dtype), mesh=mesh)
    if inv_freq_dtype is not None:
        if not isinstance(spec.position, Rope | Rope2D):
            raise InputError(f"{folder}: inv_freq_dtype is set, but the model has no rotary positions")
        spec = dataclasses.replace(spec, position=dataclasses.replace(spec.position, inv_freq_dtype=inv_freq_dtype))
    generation = folder / "generation_config.json"
    return LanguageModel(
        spec,
        params,
        tokenizer=find_tokenizer(folder, published=family_of_config(config).tokenizer(config)),
        config=config,
        generation_config=read_json(generation) if generation.is_file() else None,
        special_ids=special_ids,
        source=source,
    )


def load(
    path: str | Path, *, step: int | None = None, dtype: str = "float32", mesh: Mesh | None = None
) -> LanguageModel:
    """Load a run folder, one of its checkpoints, or a published checkpoint folder.

    Args:
      step: of a run, the checkpoint to load; default: the newest.

    Raises:
      InputError: nothing usable lies at `path`, or it is damaged.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        if step is not None:
            raise InputError(f"{folder}: a published checkpoint has no steps to choose from, found step {step}")
        return load_pretrained(folder, dtype=dtype, mesh=mesh)
    reader, only_step = open_checkpoint(folder)
    step = only_step if step is None else step
    spec = spec_from_json(reader.read_meta(step)["spec"], str(reader.folder))
    devices = mesh if mesh is not None else make_mesh(devices=jax.devices()[:1])
    params = reader.restore_params(abstract_params(spec, devices, parse_dtype(dtype)), step)
    return LanguageModel(spec, params, tokenizer=find_tokenizer(reader.folder.parent / "tokenizer"))
