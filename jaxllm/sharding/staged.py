"""Weights gathered by hand, one dimension of the torus after another.

Left to XLA's partitioner on a TPU torus of several dimensions, gradients of weights become all-reduces of whole
matrices (twice the bytes of a reduce-scatter), on v5p the gathering of weights too. Collectives along one dimension
at a time keep both forms. So the loss runs inside a `shard_map` over all axes that split rows (`by_rows`); there each
weight is this device's part of it, and `gather` stands at its only use: it is an all-gather for each mesh axis, whose
transposes scatter the sum of gradients the same way back. Other axes, as "tensor", stay with the partitioner.

Outside of such a region `gather` and its kin return their argument, so that the model is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxllm.sharding.rules import RULES, mesh_axes, within

_GATHERING = ("all_gather", "transpose", "reshape", "convert_element_type")


def is_staged(collectives: str, mesh: Mesh) -> bool:
    """Tell whether weights are gathered by hand on this mesh, by the option `mesh.collectives`: on TPU, if not told."""
    device = mesh.devices.flat[0]
    return collectives == "staged" or (collectives == "auto" and device.platform == "tpu" and mesh.size > 1)


def manual_axes() -> frozenset[str]:
    """Return the mesh axes that the code being traced handles itself."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def by_rows(function: Callable, param_specs: Any, out_specs: Any) -> Callable:
    """Map function(params, rows, rest) over the devices that hold different rows of a batch.

    Rows are arrays whose first axis is the batch, the rest is replicated.

    Args:
      param_specs: tree of the parameters' PartitionSpecs. out_specs: as for jax.shard_map.
    """
    names = frozenset(RULES.batch)
    param_specs = jax.tree.map(
        lambda spec: within(spec, names), param_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    in_specs = (param_specs, PartitionSpec(RULES.batch), PartitionSpec())
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def local_shape(shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return what of a parameter the code being traced sees."""
    mesh, split = jax.sharding.get_abstract_mesh(), within(RULES.spec(axes), manual_axes())
    return tuple(
        size // math.prod(mesh.shape[name] for name in mesh_axes(entry))
        for size, entry in zip(shape, split, strict=True)
    )


def gather(weight: jax.Array, axes: tuple[str, ...], *, keep: tuple[str, ...] = ()) -> jax.Array:
    """Return the whole of a parameter of which this device has a part; gradients are summed and scattered back.

    Args:
      axes: its logical axes. keep: those along which it stays split.
    """
    mesh, entries = jax.sharding.get_abstract_mesh(), within(RULES.spec(axes), manual_axes())
    split = {
        dimension: names
        for dimension, (axis, entry) in enumerate(zip(axes, entries, strict=True))
        if axis not in keep and (names := [name for name in mesh_axes(entry) if mesh.shape[name] > 1])
    }
    if not split:
        return weight

    def gather_parts(part: jax.Array) -> jax.Array:
        for dimension, names in split.items():
            # In front, and as a new axis: sums of large matrices, and sums along an inner dimension, would else be
            # all-reduced whole and then cut by the TPU compiler.
            part = jnp.moveaxis(part, dimension, 0)
            rest = part.shape[1:]
            for name in reversed(names):
                part = jax.lax.all_gather(part, name)
            part = jnp.moveaxis(part.reshape(-1, *rest), 0, dimension)
        return part

    # On each device also of "tensor": the partitioner would make its axes whole before any collective that is not its.
    return on_each_device(gather_parts, (axes,), axes)(weight)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Rematerialisation policy: recompute nothing but what `gather` does, so that no layer's weights are kept whole."""
    return primitive.name not in _GATHERING


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Sum what the devices computed of their parts of a logical axis."""
    names = tuple(name for name in mesh_axes(RULES.spec((axis,))[0]) if name in manual_axes())
    return jax.lax.psum(x, names) if names else x


def on_each_device(
    function: Callable[..., jax.Array], in_axes: tuple[tuple[str | None, ...], ...], out_axes: tuple[str | None, ...]
) -> Callable[..., jax.Array]:
    """Map a function of arrays over all mesh axes that are still the partitioner's.

    Args:
      in_axes, out_axes: logical axes of the arguments and of the result. Unlike other operations, a shard_map needs as
        many rows on each device: to arrays with an axis "batch" rows of zeros are added, and cut off again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = frozenset(mesh.axis_names) - manual_axes()
    if not names:
        return function
    in_specs = tuple(within(RULES.spec(axes), names) for axes in in_axes)
    out_specs = within(RULES.spec(out_axes), names)
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)
    ways = math.prod(mesh.shape[name] for name in mesh_axes(RULES.batch) if name in names)

    def filled(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if "batch" not in axes:
            return array
        rows = axes.index("batch")
        return jnp.pad(array, [(0, -size % ways if axis == rows else 0) for axis, size in enumerate(array.shape)])

    def run(*arrays: jax.Array) -> jax.Array:
        result = mapped(*map(filled, arrays, in_axes))
        return result[: arrays[0].shape[0]] if out_axes[:1] == ("batch",) else result

    return run
