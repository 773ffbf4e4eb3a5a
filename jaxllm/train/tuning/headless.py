"""Models without their output matrix, under reward and value models: what no loss reads is neither held nor trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.model import declarations
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning.base import Tuning
from jaxllm.types import Params

_HEAD = "head"


def without_head(tree: Any) -> Any:
    """Return a tree shaped like a model's parameters without the output matrix; a tied one is the embedding."""
    return {name: part for name, part in tree.items() if name != _HEAD}


@dataclasses.dataclass(frozen=True)
class Headless(Tuning):
    """A tuning of a model's parameters without its output matrix."""

    inner: Tuning

    @property
    def spec(self) -> ModelSpec:
        """The model with its head."""
        return self.inner.spec

    @property
    def draws(self) -> bool:
        """Whether the adapter itself is random in training."""
        return self.inner.draws

    def trained(self) -> Any:
        """Return the declarations of what is trained; raises InputError for an adapter beside the output matrix."""
        trained = self.inner.trained()
        if self.inner.frozen() is not None and _HEAD in trained:
            raise InputError("adapter.targets: a model that gives scores has no output matrix ('head') to train")
        return without_head(trained)

    def frozen(self) -> Any | None:
        """Return the declarations of what is frozen."""
        frozen = self.inner.frozen()
        return None if frozen is None else without_head(frozen)

    def join(self, trained: Params, frozen: Params | None) -> tuple[Params, Adapter | None]:
        """Return (parameters, adapter)."""
        return self.inner.join(trained, frozen)

    def split(self, params: Params) -> tuple[Params | None, Params | None]:
        """Return (start values, what is frozen); the parameters may have a head or none."""
        trained, frozen = self.inner.split(self._with_head(params))
        return tuple(None if tree is None else without_head(tree) for tree in (trained, frozen))

    def merge(self, trained: Params, frozen: Params | None) -> Params:
        """Return the whole model's parameters without its head."""
        return self.inner.merge(trained, frozen)

    def start(self, adapter: Adapter) -> Params:
        """Return what makes a given adapter."""
        return self.inner.start(adapter)

    def _with_head(self, params: Params) -> Params:
        """Stand in for a head, so that the tree is that of a model; nothing reads it."""
        declared = declarations(self.spec)
        if _HEAD not in declared or _HEAD in params:
            return params
        return params | {_HEAD: jnp.zeros(declared[_HEAD].value.shape, jnp.float32)}
