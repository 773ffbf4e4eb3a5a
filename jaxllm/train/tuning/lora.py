"""Low-rank products trained beside frozen matrices (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.families.keymap import get_path, set_path
from jaxllm.nn.adapter import Adapter, LowRank, adapted_paths, factor_axes
from jaxllm.nn.param import Declared
from jaxllm.nn.quantized import widened
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning.base import AdapterTuning
from jaxllm.train.tuning.targets import last_layers, matrices, named_groups, num_inputs, num_stacked, with_layers
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True)
class Target:
    """Matrices that share their first factor: one, or all that a published tensor holds.

    Attributes:
      paths: of the matrices; the shared factor lies at the first.
      scale: factor of their products.
    """

    paths: tuple[str, ...]
    rank: int
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class LoraTuning(AdapterTuning):
    """Low-rank products are trained; all parameters are frozen.

    Trained are {"a", "b"} at the path of each matrix; members of one published tensor share the "a" of the first. With
    `adapter.layers` they are of the last layers alone, and joined with zeros for the others.
    """

    def __post_init__(self):
        _check(self.spec, self.config, self.targets)

    @property
    def draws(self) -> bool:
        """Whether inputs are dropped in training."""
        return self.config.dropout > 0

    @functools.cached_property
    def targets(self) -> tuple[Target, ...]:
        """The adapted matrices."""
        return tuple(_targets(self.spec, self.config))

    def trained(self) -> Any:
        """Return the declarations of the factors."""
        tree: dict[str, Any] = {}
        for target in self.targets:
            for number, path in enumerate(target.paths):
                leaf = with_layers(matrices(self.spec)[path], self._num_layers(path))
                a, b = _factors(leaf, target.rank)
                set_path(tree, path, {"b": b} if number else {"a": a, "b": b})
        return tree

    def join(self, trained: Params, frozen: Params) -> tuple[Params, Adapter]:
        """Return the frozen parameters, and the adapter that the factors make."""
        adapter: Adapter = {}
        for target in self.targets:
            a = get_path(trained, target.paths[0])["a"]
            rate = 0.0 if target.paths[0] == "embedding" else self.config.dropout
            options = dict(scale=target.scale, rate=rate, place=zlib.crc32(target.paths[0].encode()))
            for path in target.paths:
                factors = (self._all_layers(path, factor) for factor in (a, get_path(trained, path)["b"]))
                set_path(adapter, path, LowRank(*factors, **options))
        return frozen, adapter

    def merge(self, trained: Params, frozen: Params) -> Params:
        """Return the parameters with the products added, in float32."""
        params, adapter = self.join(trained, frozen)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), widened(params, jnp.float32))
        for path in (path for target in self.targets for path in target.paths):
            merged = LowRank.merged
            for _ in range(num_stacked(matrices(self.spec)[path])):
                merged = jax.vmap(merged)
            set_path(params, path, merged(get_path(adapter, path), get_path(params, path)))
        return params

    def start(self, adapter: Adapter) -> Params:
        """Return the factors that make a given adapter of float32 numpy arrays.

        Raises:
          InputError: it has other matrices, ranks or layers than this one.
        """
        tree: dict[str, Any] = {}
        wanted = {path: target for target in self.targets for path in target.paths}
        for path in sorted(set(wanted) ^ adapted_paths(adapter)):
            found, expected = ("nothing", "a product") if path in wanted else ("a product", "nothing")
            raise InputError(f"adapter: found {found} beside {path}, expected {expected}, by adapter.targets")
        for target in self.targets:
            for number, path in enumerate(target.paths):
                low_rank: LowRank = get_path(adapter, path)
                leaf = matrices(self.spec)[path]
                count = self._num_layers(path)
                skipped = 0 if count is None else leaf.value.shape[0] - count
                a, b = low_rank.a[skipped:], low_rank.b[skipped:] * np.float32(low_rank.scale / target.scale)
                expected = tuple(each.value.shape for each in _factors(with_layers(leaf, count), target.rank))
                if (a.shape, b.shape) != expected:
                    raise InputError(
                        f"adapter: the factors beside {path} have shapes {a.shape} and {b.shape}, expected "
                        f"{expected[0]} and {expected[1]} by model, adapter.rank and adapter.layers"
                    )
                if np.any(low_rank.b[:skipped]):
                    raise InputError(f"adapter: {path} is adapted in more than the last adapter.layers = {count}")
                if number and not np.array_equal(a, get_path(tree, target.paths[0])["a"]):
                    raise InputError(
                        f"adapter: {', '.join(target.paths)} have first factors of their own; name them one by one in "
                        "adapter.targets"
                    )
                set_path(tree, path, {"b": b} if number else {"a": a, "b": b})
        return tree

    def _num_layers(self, path: str) -> int | None:
        return last_layers(self.spec, path, self.config.layers)

    def _all_layers(self, path: str, factor: jax.Array) -> jax.Array:
        """Return a factor with zeros for the layers that have none."""
        count = self._num_layers(path)
        missing = 0 if count is None else matrices(self.spec)[path].value.shape[0] - count
        return jnp.pad(factor, [(missing, 0)] + [(0, 0)] * (factor.ndim - 1)) if missing else factor


def _targets(spec: ModelSpec, config: AdapterConfig) -> Iterator[Target]:
    paths = {path: leaf for path, leaf in matrices(spec).items() if last_layers(spec, path, config.layers) != 0}
    groups = [group for name in config.targets for group in named_groups(spec, name, paths)]
    if not config.targets:
        groups = [(path,) for path in paths if path.startswith("layers")]
    special = {
        path: entry for entry in config.per_target for group in named_groups(spec, entry.name, paths) for path in group
    }
    for group in groups:
        entry = special.get(group[0])
        rank = entry.rank if entry is not None and entry.rank is not None else config.rank
        alpha = entry.alpha if entry is not None and entry.alpha is not None else config.alpha
        yield Target(group, rank, alpha / (rank**0.5 if config.rank_stabilized else rank))


def _check(spec: ModelSpec, config: AdapterConfig, targets: tuple[Target, ...]) -> None:
    paths = [path for target in targets for path in target.paths]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"adapter.targets: {path} is named twice, by {config.targets}")
        if path == "head" and spec.head.normalized:
            raise InputError("adapter.targets: the head of this model is normalised; leave it out")
        if path == "embedding" and spec.head.tie_word_embeddings:
            raise InputError("adapter.targets: the embedding of this model is its head too; leave out the embedding")
        if config.dropout and (path == "head" or "experts" in path.split("/")):
            raise InputError(
                f"adapter.dropout: {path} can be adapted only without dropout, found {config.dropout}; set it to 0, or "
                "name other adapter.targets"
            )


def _factors(leaf: Declared, rank: int) -> tuple[Declared, Declared]:
    """Declare the factors beside a matrix, which start as peft's: one at random, the other with zeros."""
    lead, inputs, shape = num_stacked(leaf), num_inputs(leaf), leaf.value.shape
    first, second = factor_axes(leaf.axes, inputs)
    kinds = ("zero_matrix", "unit") if leaf.kind == "embedding" else ("uniform", "zero_matrix")
    shapes = (
        (*shape[: lead + inputs], rank),
        (*shape[:lead], rank, *shape[lead + inputs :]),
    )
    a, b = (
        Declared(jax.ShapeDtypeStruct(shape, jnp.float32), axes, kind, leaf.fan_in)
        for shape, axes, kind in zip(shapes, (first, second), kinds, strict=True)
    )
    return a, b
