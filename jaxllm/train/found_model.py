"""A model on disk: what the run, folder or file that it lies in must tell about it."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.errors import InputError
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer
from jaxllm.types import Params

Pin = dict[str, Any]
"""Which weights were read: {"step": of a run's checkpoint or None, "identity": str}."""

_WEIGHTS = (".safetensors", ".bin", ".gguf", "config.json")
_PIECES = 256
_PIECE_BYTES = 4096


class FoundModel(abc.ABC):
    """A model on disk, of which nothing but its description has been read.

    Attributes:
      path: as the user names it.
      spec: the architecture; of a ppo run that of its policy.
      has_score: whether it is a reward model.
      step: of a run, that of the checkpoint; else None.
      end_id: the token after a whole conversation at which its score is read; None: the one that ends the answer.
    """

    path: Path
    spec: ModelSpec
    has_score: bool
    end_id: int | None = None
    step: int | None = None

    @abc.abstractmethod
    def identity(self) -> str:
        """Return a digest that changes with its weights, and not with where or when they were copied."""

    @property
    def pin(self) -> Pin:
        """What `run_models.find_again` tells it by, as JSON."""
        return {"step": self.step, "identity": self.identity()}

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that lies with it, None if there is none."""

    @abc.abstractmethod
    def chat_format(self, tokenizer: Tokenizer) -> str | None:
        """Return the name of the format it was trained to chat in; None if it was not."""

    @abc.abstractmethod
    def model(self, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Params:
        """Return the parameters of the whole model, adapters merged.

        Args:
          mesh: to read straight onto; None: the first device.
          dtype: None: the narrowest that holds the numbers as stored (float32 where an adapter is merged).

        Raises:
          InputError: it is a reward model, or what an adapter stands beside is gone or of another model.
        """

    @abc.abstractmethod
    def reward_model(self, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Params:
        """Return {"model", "score": {"kernel": [D]}}, adapters merged; the model has a head only if it was trained.

        Arguments and errors as in `model`, but that it is not a reward model.
        """

    def require_score(self) -> None:
        """Raise InputError unless it is a reward model."""
        if not self.has_score:
            raise InputError(
                f"{self.path}: found a language model without a scalar head; expected a reward model (stage reward)"
            )

    def require_language_model(self) -> None:
        """Raise InputError if it is a reward model."""
        if self.has_score:
            raise InputError(
                f"{self.path}: found a reward model, which gives scores and no text; expected a language model"
            )


def contents(files: Iterable[Path]) -> str:
    """Return a digest of those files that hold weights or a configuration: their names, sizes, and pieces of each.

    The pieces, a megabyte of a file in all, lie so close that every large matrix has some.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.name.endswith(_WEIGHTS)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for number in range(_PIECES):
                file.seek(max(size - _PIECE_BYTES, 0) * number // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
