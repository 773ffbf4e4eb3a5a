"""Some of a model's weights trained, the others frozen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.families.keymap import get_path, set_path
from jaxllm.nn.quantized import widened
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning.base import Tuning
from jaxllm.train.tuning.frozen import held_declarations, hold
from jaxllm.train.tuning.targets import declared_by_path, last_layers, named_groups, with_layers
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class PartialTuning(Tuning):
    """The named weights, of the last layers alone if `adapter.layers` says so, are trained; all others are frozen.

    A weight of which some layers are trained and some frozen is two arrays, which make it together; both are float32,
    whatever the base.
    """

    spec: ModelSpec
    config: AdapterConfig

    def __post_init__(self):
        if not self.config.targets:
            raise InputError("adapter.targets: kind 'partial' needs the names of the weights to train, found []")
        if not self.counts:
            raise InputError(f"adapter.targets: nothing of {self.config.targets} is in the last layers")

    @functools.cached_property
    def counts(self) -> dict[str, int | None]:
        """How many layers of each trained parameter are trained, by path; None for one of no layer."""
        paths = declared_by_path(self.spec)
        groups = itertools.chain(*(named_groups(self.spec, name, paths) for name in self.config.targets))
        counts = {path: last_layers(self.spec, path, self.config.layers) for path in itertools.chain(*groups)}
        return {path: count for path, count in counts.items() if count != 0}

    def trained(self) -> Any:
        """Return the declarations of the trained weights."""
        tree: dict[str, Any] = {}
        for path, count in self.counts.items():
            set_path(tree, path, with_layers(declared_by_path(self.spec)[path], count))
        return tree

    def frozen(self) -> Any:
        """Return the declarations of the others as they are held."""
        return held_declarations(self._frozen_declarations(), self.config.base, self.counts)

    def join(self, trained: Params, frozen: Params) -> tuple[Params, None]:
        """Return the whole parameters, without an adapter."""
        params = jax.tree.map(lambda leaf: leaf, frozen)
        for path in self.counts:
            weight = get_path(trained, path)
            if self._num_frozen(path):
                weight = jnp.concatenate([get_path(frozen, path), weight])
            set_path(params, path, weight)
        return params, None

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the trained weights, and the others as they are held."""
        trained: Params = {}
        frozen: Params = {}
        for path in declared_by_path(self.spec):
            weight, num_frozen = get_path(params, path), self._num_frozen(path)
            if path in self.counts:
                set_path(trained, path, weight[num_frozen:] if num_frozen else weight)
            if path not in self.counts or num_frozen:
                set_path(frozen, path, weight[:num_frozen] if path in self.counts else weight)
        return trained, hold(frozen, self._frozen_declarations(), self.config.base, self.counts)

    def merge(self, trained: Params, frozen: Params) -> Params:
        """Return the whole parameters in float32."""
        params = widened(self.join(trained, frozen)[0], jnp.float32)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def _num_frozen(self, path: str) -> int:
        """Return how many layers of a trained parameter are frozen."""
        count = self.counts.get(path)
        return 0 if count is None else declared_by_path(self.spec)[path].value.shape[0] - count

    def _frozen_declarations(self) -> Any:
        tree: dict[str, Any] = {}
        for path, leaf in declared_by_path(self.spec).items():
            if path not in self.counts:
                set_path(tree, path, leaf)
            elif num_frozen := self._num_frozen(path):
                set_path(tree, path, with_layers(leaf, num_frozen))
        return tree
