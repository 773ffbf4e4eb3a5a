"""Weights put together to sample with.

Every token needs all weights. Where FSDP splits them, a decoding step would gather the whole model again for each
token, many times what else it moves. So a round of sampling can put them together once: on each device whole but for
the tensor and expert axes, and in the dtype that is computed in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxllm.generate.decoding import Weights
from jaxllm.nn.model import declarations
from jaxllm.nn.param import is_declared
from jaxllm.sharding.rules import FSDP_AXES, mesh_axes
from jaxllm.spec import ModelSpec

_MULTIPLIED = ("matrix", "output", "embedding")


def gathered_shapes(spec: ModelSpec, weights: Weights, dtype: jnp.dtype | None) -> Weights:
    """Return shapes, dtypes and shardings of weights as they are sampled with.

    Cast are only those that the model itself casts before it uses them, so that it computes the same.

    Args:
      weights: arrays or jax.ShapeDtypeStruct with shardings. dtype: of activations; None: the parameters' own.
    """
    cast = _cast_paths(spec)

    def wanted(path: tuple, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        narrower = dtype is not None and leaf.dtype == jnp.float32 and _name(path) in cast
        return jax.ShapeDtypeStruct(leaf.shape, dtype if narrower else leaf.dtype, sharding=_whole(leaf.sharding))

    params = jax.tree_util.tree_map_with_path(wanted, weights.params)
    return Weights(params, jax.tree_util.tree_map_with_path(wanted, weights.adapter))


def gather_weights(spec: ModelSpec, weights: Weights, dtype: jnp.dtype | None) -> Weights:
    """Put weights together as `gathered_shapes` says; those that lie so already are not copied."""
    leaves, tree = jax.tree.flatten(weights)
    wanted = jax.tree.leaves(gathered_shapes(spec, weights, dtype))
    moved = [place for place, pair in enumerate(zip(leaves, wanted, strict=True)) if differ(*pair)]
    if moved:
        gather = gathering(tuple(leaves[place].sharding for place in moved), tuple(wanted[place] for place in moved))
        for place, leaf in zip(moved, gather([leaves[place] for place in moved]), strict=True):
            leaves[place] = leaf
    return jax.tree.unflatten(tree, leaves)


@functools.lru_cache(maxsize=8)
def gathering(lie: Sequence[Sharding], wanted: Sequence[jax.ShapeDtypeStruct]) -> Callable:
    """Build the jitted program that puts a list of arrays together; they `lie` as given."""

    def gather(leaves: list[jax.Array]) -> list[jax.Array]:
        # Pinned: what crosses the network has the narrower type.
        return [
            jax.lax.with_sharding_constraint(leaf.astype(each.dtype), sharding)
            for leaf, each, sharding in zip(leaves, wanted, lie, strict=True)
        ]

    return jax.jit(gather, out_shardings=[each.sharding for each in wanted])


def differ(leaf: jax.Array | jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> bool:
    """Tell whether an array has another dtype or lies elsewhere than wanted."""
    return leaf.dtype != wanted.dtype or not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def _whole(sharding: Sharding) -> Sharding:
    """Return where an array lies that FSDP does not split; the expert axis splits what is no expert's as FSDP does."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    kept = (None if set(mesh_axes(entry)) & set(FSDP_AXES) else entry for entry in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


@functools.lru_cache(maxsize=16)
def _cast_paths(spec: ModelSpec) -> frozenset[str]:
    """Return the paths of parameters that are used in the dtype of activations alone."""
    declared = jax.tree_util.tree_leaves_with_path(declarations(spec), is_leaf=is_declared)
    paths = {_name(path) for path, leaf in declared if leaf.kind in _MULTIPLIED}
    # Routers multiply in float32, and a normalised head has its norm taken in float32.
    if spec.head.normalized:
        paths.discard("embedding" if spec.head.tie_word_embeddings else "head")
    return frozenset(path for path in paths if not path.endswith("router/kernel"))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
