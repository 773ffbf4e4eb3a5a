"""Models as runs of any stage hold them: whole, beside an adapter, under a score, or next to a value model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import common_dtype, is_published, open_published
from jaxllm.checkpoint.hf import load_checkpoint
from jaxllm.checkpoint.manifest import MANIFEST_NAME
from jaxllm.checkpoint.opened import published_tokenizer
from jaxllm.checkpoint.published import read_published
from jaxllm.checkpoint.reader import CheckpointReader, open_checkpoint
from jaxllm.checkpoint.reward_folder import is_reward_config, language_model_config, load_reward_folder
from jaxllm.checkpoint.run_folder import RunFolder
from jaxllm.config import RunConfig
from jaxllm.config.alignment import AdapterConfig, AdapterTargetConfig
from jaxllm.data.encoders import default_chat_format
from jaxllm.errors import InputError, located
from jaxllm.families import family_of_config
from jaxllm.nn import score
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.model import abstract_params
from jaxllm.nn.param import abstract_values
from jaxllm.nn.quantized import widened
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import ModelSpec, spec_from_json
from jaxllm.tokenizers import Tokenizer, find_tokenizer
from jaxllm.train.found_model import FoundModel, Pin, contents
from jaxllm.train.tuning import Tuning, make_tuning
from jaxllm.train.tuning.headless import Headless, without_head
from jaxllm.train.tuning.prefix import PrefixTuning
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True)
class PublishedModel(FoundModel):
    """A published folder or a .gguf file."""

    path: Path

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The raw config.json."""
        return open_published(self.path)[0]

    @property
    def has_score(self) -> bool:
        """Whether it is a reward model."""
        return is_reward_config(self.config)

    @property
    def end_id(self) -> int | None:
        """The token that InternLM2's own reward models read their score at."""
        token, most = self.config.get("reward_token_id"), self.spec.vocab_size
        if token is not None and not (isinstance(token, int) and 0 <= token < most):
            raise InputError(f"{self.path / 'config.json'}: reward_token_id: found {token!r}, expected 0 to {most - 1}")
        return token

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The architecture."""
        config = language_model_config(self.config) if self.has_score else self.config
        return family_of_config(config, str(self.path / "config.json")).spec_from_hf(config)

    def identity(self) -> str:
        return contents([self.path] if self.path.is_file() else self.path.iterdir())

    def tokenizer(self) -> Tokenizer | None:
        return published_tokenizer(self.path, self.spec)

    def chat_format(self, tokenizer: Tokenizer) -> str | None:
        return _family_chat(self.config, tokenizer)

    def model(self, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Params:
        self.require_language_model()
        return load_checkpoint(self.path, dtype=dtype or self._stored_dtype, mesh=mesh)[1]

    def reward_model(self, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Params:
        self.require_score()
        return load_reward_folder(self.path, dtype=dtype or self._stored_dtype, mesh=mesh)[1]

    @property
    def _stored_dtype(self) -> jnp.dtype:
        _, tensors = open_published(self.path)
        return common_dtype([tensors.dtype(name) for name in tensors.files])


@dataclasses.dataclass(frozen=True)
class SavedModel(FoundModel):
    """A checkpoint of a run.

    Attributes:
      path: as the user names it. step: of the checkpoint.
    """

    path: Path
    reader: CheckpointReader
    step: int

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What was saved about it."""
        return self.reader.read_meta(self.step)

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The architecture; of a ppo run that of its policy."""
        return spec_from_json(self.meta["spec"], str(self.path))

    @property
    def has_score(self) -> bool:
        """Whether it is a reward model."""
        return self._option("stage") == "reward"

    @functools.cached_property
    def tuning(self) -> Tuning:
        """How the run tuned its model."""
        adapter = self._option("adapter")
        return make_tuning(self.spec, None if adapter is None else _adapter_config(adapter))

    @property
    def base(self) -> tuple[str, Pin] | None:
        """Where the weights lay that the run began with, and which they were; None: it began with none."""
        path = self.meta.get("init_from")
        pin = self.meta.get("models", {}).get(path)
        return None if pin is None else (path, pin)

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.reader.folder.parent)

    def identity(self) -> str:
        # The manifest has the checksums of all files.
        return hashlib.sha256((self.reader.folder / str(self.step) / MANIFEST_NAME).read_bytes()).hexdigest()

    def tokenizer(self) -> Tokenizer | None:
        return find_tokenizer(self.run.tokenizer, num_rows=self.spec.vocab_size)

    def chat_format(self, tokenizer: Tokenizer) -> str | None:
        if "config" in self.meta:
            if "chat_format" in self.meta:
                return self.meta["chat_format"]
            given = self._option("chat") or {}
            return given.get("format") or default_chat_format(self._option("model")["name"], tokenizer)
        published = read_published(self.run.path)
        return None if published is None else _family_chat(published[0], tokenizer)

    def model(self, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Params:
        self.require_language_model()
        return self._whole(self.tuning, "policy" if self._option("stage") == "ppo" else None, mesh, dtype)

    def model_and_prefix(self, mesh: Mesh | None, dtype: jnp.dtype | None) -> tuple[Params, Adapter | None]:
        """Return the parameters, and the prefix that they cannot take in, or None; otherwise as `model`."""
        if not isinstance(self.tuning, PrefixTuning):
            return self.model(mesh, dtype), None
        self.require_language_model()
        part = "policy" if self._option("stage") == "ppo" else None
        trained = self._restore(self.tuning.trained(), part, mesh, jnp.float32)

        def join(trained: Params, base: Params) -> tuple[Params, Adapter]:
            joined = self.tuning.join(trained, widened(self.tuning.split(base)[1], jnp.float32))
            return jax.tree.map(lambda leaf: leaf.astype(dtype or jnp.float32), joined)

        return jax.jit(join)(trained, self._base(mesh))

    def reward_model(self, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Params:
        self.require_score()
        has_head = "model/head" in self.reader.stored_params(self.step)
        declared = score.declarations(self.spec)
        return {
            "model": self._whole(self.tuning if has_head else Headless(self.tuning), "model", mesh, dtype),
            "score": self._restore(declared, "score", mesh, dtype),
        }

    def adapter(self) -> tuple[AdapterConfig, Adapter]:
        """Return an adapter's options and its numpy arrays, without what it stands beside.

        Raises:
          InputError: the run has none.
        """
        fields, stage = self._option("adapter"), self._option("stage")
        if fields is None or fields["kind"] == "partial":
            raise InputError(
                f"{self.path}: found a run without an adapter; expected one with adapter.kind lora or prefix"
            )
        part = {"ppo": "policy", "reward": "model"}.get(stage)
        # As numpy, which is on no device: the caller may be at work on a mesh.
        trained = jax.tree.map(np.asarray, self._restore(self.tuning.trained(), part, None, jnp.float32))
        return self.tuning.config, jax.tree.map(np.asarray, self.tuning.join(trained, None)[1])

    def _whole(self, tuning: Tuning, part: str | None, mesh: Mesh | None, dtype: jnp.dtype | None) -> Params:
        """Return the whole model of which `part` of the checkpoint is trained."""
        trained = self._restore(tuning.trained(), part, mesh, dtype)
        if tuning.frozen() is None:
            return trained
        base = self._base(mesh)

        def merge(trained: Params, base: Params) -> Params:
            merged = tuning.merge(trained, tuning.split(base)[1])
            return merged if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), merged)

        return jax.jit(merge, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, base))(trained, base)

    def _restore(self, declared: Any, part: str | None, mesh: Mesh | None, dtype: jnp.dtype | None) -> Params:
        mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        abstract = abstract_values(declared, mesh, dtype or self._stored_dtype)
        if part is None:
            return self.reader.restore_params(abstract, self.step)
        return self.reader.restore_params({part: abstract}, self.step, part=True)[part]

    def _base(self, mesh: Mesh | None) -> Params:
        """Return the float32 parameters that the adapter stands beside, with a head where the model has one."""
        path = self.meta["init_from"]
        try:
            found = find_again(path, None if self.base is None else self.base[1])
            base = found.reward_model(mesh)["model"] if found.has_score else found.model(mesh)
        except InputError as error:
            raise InputError(f"{self.path}: its adapter stands beside the weights of {path}: {error}") from error
        expected, shapes = without_head(abstract_params(self.spec)), without_head(base)
        if jax.tree.map(jnp.shape, shapes) != jax.tree.map(jnp.shape, expected):
            raise InputError(f"{self.path}: its adapter stands beside the weights of {path}, which are another model's")
        return without_head(base) if self.has_score else base

    @property
    def _stored_dtype(self) -> jnp.dtype:
        stored = self.reader.stored_params(self.step).values()
        return common_dtype([jnp.dtype(text.partition("[")[0]) for text in stored])

    def _option(self, name: str) -> Any:
        """Return an option of the run; None for an imported one, which has no config."""
        return self.meta.get("config", {}).get(name)


def find_model(path: str | Path, step: int | None = None) -> FoundModel:
    """Find the model that lies at a published folder, a .gguf file, a run or one of its checkpoints.

    Args:
      step: of a run, the checkpoint; default: the newest.

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = Path(path)
    if is_published(path):
        if step is not None:
            raise InputError(f"{path}: a published checkpoint has no steps to choose from, found step {step}")
        return PublishedModel(path)
    if not path.exists():
        raise InputError(f"{path}: not there; expected a run, a checkpoint, a published folder or a .gguf file")
    reader, only_step = open_checkpoint(path)
    return SavedModel(path, reader, reader.find_step(only_step if step is None else step))


def starting_model(config: RunConfig) -> FoundModel | None:
    """Find the model that a run goes on from: its own, once it has a checkpoint, else its weights; None: it is drawn.

    A checkpoint of a run that began with other weights than those named is not its own.

    Raises:
      InputError: `model.weights` are not there.
    """
    own = CheckpointReader(RunFolder(config.run_dir).checkpoints)
    if own.latest_step() is not None and config.model.weights in (None, own.read_meta().get("init_from")):
        return find_model(config.run_dir)
    if config.model.weights is None:
        return None
    with located("model.weights"):
        return find_model(config.model.weights)


def find_again(path: str | Path, pin: Pin | None) -> FoundModel:
    """Find the very model that was read before; of a run that has gone on since, its earlier checkpoint.

    Args:
      pin: `FoundModel.pin` of that time; None: whichever model lies there now.

    Raises:
      InputError: it is not there any more.
    """
    if pin is None:
        return find_model(path)
    try:
        found = find_model(path, pin["step"])
    except InputError as error:
        raise InputError(f"{path}: the weights that this run began with are gone: {error}") from error
    if found.identity() != pin["identity"]:
        raise InputError(f"{path}: found other weights than those that this run began with; expected the same")
    return found


def _family_chat(config: dict[str, Any], tokenizer: Tokenizer) -> str | None:
    plain = language_model_config(config) if is_reward_config(config) else config
    return family_of_config(plain).chat(plain, tokenizer.special_tokens)


def _adapter_config(fields: dict[str, Any]) -> AdapterConfig:
    per_target = [AdapterTargetConfig(**target) for target in fields["per_target"]]
    return AdapterConfig(**fields | {"per_target": per_target})
