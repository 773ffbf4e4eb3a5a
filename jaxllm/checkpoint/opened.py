"""A model as it lies on disk, published or in a run folder, brought onto the devices with all that belongs to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import common_dtype, is_published, open_published, parse_json
from jaxllm.checkpoint.gguf import GGUFCheckpoint
from jaxllm.checkpoint.hf import Source, load_checkpoint
from jaxllm.checkpoint.manifest import read_manifest
from jaxllm.checkpoint.published import read_published
from jaxllm.checkpoint.reader import open_checkpoint
from jaxllm.checkpoint.run_folder import RunFolder
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.families.base import Config
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import ModelSpec, spec_from_json
from jaxllm.tokenizers import Tokenizer, find_tokenizer
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with what belongs to it.

    Attributes:
      config, source: of the published checkpoint that it is or was imported from, or None.
      tokenizer: or None if none was found.
      path: where it was found.
    """

    spec: ModelSpec
    params: Params
    config: Config | None = None
    source: Source | None = None
    tokenizer: Tokenizer | None = None
    path: Path = Path()

    @property
    def generation_config(self) -> dict[str, Any]:
        """The raw generation_config.json, {} if there was none; InputError where it is faulty."""
        name = "generation_config.json"
        content = None if self.source is None else self.source.side_files.get(name)
        return {} if content is None else parse_json(content, str(self.path / name))


def open_model(
    path: str | Path, *, step: int | None = None, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
) -> Opened:
    """Load a published folder, a .gguf file, a run or one of its checkpoints.

    Args:
      step: of a run, the checkpoint to load; default: the newest.
      dtype: of the parameters; None: the narrowest that holds the numbers as stored.

    Raises:
      InputError: nothing usable lies at `path`, or it is damaged.
    """
    path = Path(path)
    if not is_published(path):
        return _open_run(path, step, dtype, mesh)
    if step is not None:
        raise InputError(f"{path}: a published checkpoint has no steps to choose from, found step {step}")
    return open_published_model(path, dtype=dtype, mesh=mesh)


def open_published_model(path: Path, *, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> Opened:
    """Load a published folder or a .gguf file; arguments as in `open_model`.

    Raises:
      InputError: neither lies at `path`, or it is damaged.
    """
    config, tensors = open_published(path)
    if dtype is None:
        dtype = common_dtype([tensors.dtype(name) for name in tensors.files])
    spec, params, config, source = load_checkpoint(path, dtype=dtype, mesh=mesh)
    if isinstance(tensors, GGUFCheckpoint):
        tokenizer = tensors.tokenizer()
    else:
        published = family_of_config(config).tokenizer(config)
        tokenizer = find_tokenizer(path, published=published, num_rows=spec.vocab_size)
    return Opened(spec, params, config, source, tokenizer, path)


def _open_run(path: Path, step: int | None, dtype: jnp.dtype | None, mesh: Mesh | None) -> Opened:
    reader, only_step = open_checkpoint(path)
    step = only_step if step is None else step
    spec = spec_from_json(reader.read_meta(step)["spec"], str(reader.folder))
    if dtype is None:
        arrays = read_manifest(reader.folder / str(reader.latest_step() if step is None else step)).arrays
        stored = (text.partition("[")[0] for name, text in arrays.items() if name.startswith("params/"))
        dtype = common_dtype([jnp.dtype(each) for each in stored])
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    params = reader.restore_params(abstract_params(spec, mesh, dtype), step)
    run = RunFolder(reader.folder.parent)
    config, source = read_published(run.path) or (None, None)
    tokenizer = find_tokenizer(run.tokenizer, num_rows=spec.vocab_size)
    return Opened(spec, params, config, source, tokenizer, run.path)
