"""Which matrices an adapter's targets name."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxllm.errors import InputError
from jaxllm.families import FAMILIES
from jaxllm.families.keymap import Key
from jaxllm.nn.model import declarations
from jaxllm.nn.param import Declared, is_declared
from jaxllm.spec import ModelSpec

_MATRICES = ("matrix", "output")


@functools.lru_cache(maxsize=64)
def declared_by_path(spec: ModelSpec) -> dict[str, Declared]:
    """Return a model's declarations by "/"-separated path."""
    leaves = jax.tree_util.tree_leaves_with_path(declarations(spec), is_leaf=is_declared)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def matrices(spec: ModelSpec) -> dict[str, Declared]:
    """Return the matrices that low-rank products may stand beside, by path: all but the router of experts."""
    return {
        path: leaf
        for path, leaf in declared_by_path(spec).items()
        if path == "embedding" or (leaf.kind in _MATRICES and not path.endswith("router/kernel"))
    }


def last_layers(spec: ModelSpec, path: str, count: int | None) -> int | None:
    """Return how many of the model's `count` last layers a parameter is stacked over; None for one of no layer.

    Args:
      count: None: all layers.
    """
    for group in spec.layer_groups:
        if path.startswith(f"{group.name}/"):
            first = group.start if count is None else max(group.start, spec.num_layers - count)
            return max(0, group.stop - first)
    return None


def with_layers(leaf: Declared, count: int | None) -> Declared:
    """Return a stacked parameter's declaration with so many layers; None: as it is."""
    if count is None:
        return leaf
    return leaf.replace(value=jax.ShapeDtypeStruct((count, *leaf.value.shape[1:]), leaf.value.dtype))


def num_inputs(leaf: Declared) -> int:
    """Return how many of a matrix's dimensions, after layers and experts, are its inputs."""
    if leaf.kind == "embedding":
        return 1
    shape, inputs, size = leaf.value.shape[num_stacked(leaf) :], 0, 1
    while size != leaf.fan_in or inputs == 0:
        size *= shape[inputs]
        inputs += 1
    return inputs


def num_stacked(leaf: Declared) -> int:
    """Return how many of a matrix's dimensions are layers and experts."""
    return sum(axis in ("layers", "experts") for axis in leaf.axes)


def named_groups(spec: ModelSpec, name: str, paths: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the groups of `paths` that a target names.

    A part of a parameter's path ("q", "experts", "mlp") names each by itself; the end of a published tensor's name
    ("c_attn", "mlp.c_proj") names all that the tensor holds as one group.

    Raises:
      InputError: it names nothing.
    """
    own = [(path,) for path in paths if name in path.removesuffix("/kernel").split("/")]
    if own:
        return own
    for family in FAMILIES:
        if groups := [key.paths for key in _published(family.name, spec) if _is_named(key, name, paths)]:
            return list(dict.fromkeys(groups))
    known = sorted({path.removesuffix("/kernel").split("/")[-1] for path in paths})
    raise InputError(
        f"adapter.targets: {name!r} names no matrix of this model; expected some of {', '.join(known)}, or the end of "
        "a published tensor's name without .weight"
    )


@functools.lru_cache(maxsize=64)
def _published(family_name: str, spec: ModelSpec) -> tuple[Key, ...]:
    """Return a family's table; nothing where its layout cannot express the model."""
    family = next(family for family in FAMILIES if family.name == family_name)
    try:
        family.to_hf(spec)
    except InputError:
        return ()
    return tuple(key for key in family.keys(spec) if not key.copy)


def _is_named(key: Key, name: str, paths: dict[str, Any]) -> bool:
    module = key.name.removesuffix(".weight").removesuffix(".bias")
    return module != key.name and f".{module}".endswith(f".{name}") and all(path in paths for path in key.paths)
