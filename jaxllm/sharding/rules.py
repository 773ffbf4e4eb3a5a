"""From logical axis names to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import InputError

MeshAxes = str | tuple[str, ...] | None

FSDP_AXES = ("fsdp_x", "fsdp_y", "fsdp_z")
"""Sharded data parallelism: one mesh axis for each dimension of a TPU torus; elsewhere only the first is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; None is replicated.

    The defaults serve FSDP, tensor parallelism and both together, because an axis of size 1 splits nothing.
    `replicas` is the batch axis of activations whose hidden dimension still lies as in the embedding table. The mesh
    axis "expert" splits experts, and everything else as the FSDP axes do; `expert_embed` is the hidden dimension of
    what it splits by experts already. A latent dimension is `lora` where it comes out of a matrix whose hidden
    dimension is split, and `latent` where it goes in.
    """

    vocab: MeshAxes = "tensor"
    embed: MeshAxes = (*FSDP_AXES, "expert")
    expert_embed: MeshAxes = FSDP_AXES
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"
    experts: MeshAxes = "expert"
    lora: MeshAxes = None
    latent: MeshAxes = FSDP_AXES
    norm: MeshAxes = None
    positions: MeshAxes = None
    layers: MeshAxes = None
    batch: MeshAxes = ("replica", *FSDP_AXES, "expert")
    replicas: MeshAxes = "replica"
    length: MeshAxes = None
    act_embed: MeshAxes = None
    act_heads: MeshAxes = "tensor"
    act_mlp: MeshAxes = "tensor"

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Return the PartitionSpec of an array with these logical axes.

        Raises:
          InputError: an unknown logical axis, or one mesh axis used for two dimensions.
        """
        known = {field.name for field in dataclasses.fields(self)}
        unknown = [axis for axis in axes if axis is not None and axis not in known]
        if unknown:
            raise InputError(f"unknown logical axis {unknown[0]!r}; known: {', '.join(sorted(known))}")
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for entry in entries for name in mesh_axes(entry)]
        if len(used) != len(set(used)):
            raise InputError(f"logical axes {axes} use a mesh axis twice: {entries}")
        return PartitionSpec(*entries)


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


RULES = ShardingRules()

ROWS = RULES.spec(("batch",))
"""How arrays of rows are split, by their first dimension."""


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return how arrays of rows lie on a mesh."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return how arrays lie of which every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Return how many ways rows are split over a mesh."""
    return math.prod(mesh.shape[axis] for axis in RULES.batch)


def sharding_for(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh, rules: ShardingRules = RULES) -> Any:
    """Return the NamedSharding of one array; a dimension that its mesh axes do not divide is an error.

    Raises:
      InputError: names the logical axis, the dimension and the mesh axes.
    """
    spec = rules.spec(axes)
    for size, axis, entry in zip(shape, axes, spec, strict=True):
        names = [name for name in mesh_axes(entry) if mesh.shape[name] > 1]
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            raise InputError(f"mesh: {axis} of size {size} cannot be split {ways} ways over {' x '.join(names)}")
    return NamedSharding(mesh, spec)


def within(spec: PartitionSpec, names: Collection[str]) -> PartitionSpec:
    """Return what a PartitionSpec says of some of the mesh axes."""
    kept = (tuple(name for name in mesh_axes(entry) if name in names) for entry in spec)
    return PartitionSpec(*(entry or None for entry in kept))


def constrain(x: jax.Array, *axes: str | None, rules: ShardingRules = RULES) -> jax.Array:
    """Pin an activation's sharding by logical axes, where a mesh is in use (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.lax.with_sharding_constraint(x, within(rules.spec(axes), automatic))
