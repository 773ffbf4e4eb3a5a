"""A model brought onto the devices with all that belongs to it; published ones here, runs in `jaxllm.pretrained`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import common_dtype, is_published, open_published, parse_json, read_config
from jaxllm.checkpoint.gguf import GGUFCheckpoint
from jaxllm.checkpoint.hf import Source, load_checkpoint
from jaxllm.checkpoint.reward_folder import is_reward_config, language_model_config, load_reward_folder
from jaxllm.errors import InputError
from jaxllm.families import family_of_config, find_family
from jaxllm.families.base import Config
from jaxllm.nn.adapter import Adapter
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with what belongs to it.

    Attributes:
      config, source: of the published checkpoint that it is or was imported from, or None.
      tokenizer: or None if none was found.
      path: where it was found.
      chat: name of the format that a run was trained to chat in; None: not known.
      adapter: what a run trained beside the parameters that they cannot take in: a prefix; or None.
      score: {"kernel": [D]} of a reward model, whose parameters have no output matrix; else None.
    """

    spec: ModelSpec
    params: Params
    config: Config | None = None
    source: Source | None = None
    tokenizer: Tokenizer | None = None
    path: Path = Path()
    chat: str | None = None
    adapter: Adapter | None = None
    score: Params | None = None

    @property
    def generation_config(self) -> dict[str, Any]:
        """The raw generation_config.json, {} if there was none; InputError where it is faulty."""
        name = "generation_config.json"
        content = None if self.source is None else self.source.side_files.get(name)
        return {} if content is None else parse_json(content, str(self.path / name))


def open_published_model(path: Path, *, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> Opened:
    """Load a published folder, of a language model or a reward model, or a .gguf file.

    Args:
      dtype: of the parameters; None: the narrowest that holds the numbers as stored.

    Raises:
      InputError: none of them lies at `path`, or it is damaged.
    """
    config, tensors = open_published(path)
    if dtype is None:
        dtype = common_dtype([tensors.dtype(name) for name in tensors.files])
    if is_reward_config(config):
        spec, params, config, source = load_reward_folder(path, dtype=dtype, mesh=mesh)
        tokenizer = published_tokenizer(path, spec)
        return Opened(spec, params["model"], config, source, tokenizer, path, score=params["score"])
    spec, params, config, source = load_checkpoint(path, dtype=dtype, mesh=mesh)
    return Opened(spec, params, config, source, published_tokenizer(path, spec), path)


def published_tokenizer(path: Path, spec: ModelSpec) -> Tokenizer | None:
    """Return the tokenizer that lies with a published model, None if there is none."""
    config, tensors = open_published(path)
    if isinstance(tensors, GGUFCheckpoint):
        return tensors.tokenizer()
    config = language_model_config(config) if is_reward_config(config) else config
    published = family_of_config(config).tokenizer(config)
    return find_tokenizer(path, published=published, num_rows=spec.vocab_size)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer's file or folder, or the tokenizer of a published model, a .gguf file or a run.

    Many published ones are just called tokenizer.model: whose special tokens belong to it, the model's config says.

    Raises:
      InputError: there is none, or it is faulty.
    """
    path = Path(path)
    if not is_published(path):
        own = path / "tokenizer"
        return load_tokenizer(own if (path / "checkpoints").is_dir() and own.is_dir() else path)
    if not path.is_dir():
        tokenizer = GGUFCheckpoint(path).tokenizer()
        if tokenizer is None:
            raise InputError(f"tokenizer {path}: the file holds none")
        return tokenizer
    config = read_config(path)
    plain = language_model_config(config) if is_reward_config(config) else config
    family = find_family(plain)
    return load_tokenizer(path, published=None if family is None else family.tokenizer(plain))
