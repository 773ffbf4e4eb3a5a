"""The device mesh: its axes, their order and how configured sizes fill the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxllm.errors import InputError
from jaxllm.sharding.rules import FSDP_AXES

MESH_AXES = ("replica", "pipeline", *FSDP_AXES, "expert", "sequence", "tensor")
"""Slowest network first. Every mesh has all axes, most of size 1, so that sharding specs never change."""


def make_mesh(
    *,
    replica: int = 1,
    fsdp: int | Literal["auto"] = "auto",
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build a mesh over all devices.

    On TPU every mesh axis lies along dimensions of the torus, and what `fsdp` has of each dimension is an axis of its
    own, so that collectives can go one dimension at a time. Elsewhere all of `fsdp` is the first of these axes.

    Args:
      fsdp: "auto" takes the devices that the other axes leave over.

    Raises:
      InputError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = replica * expert * tensor
    if fsdp == "auto":
        if len(devices) % others:
            given = f"replica {replica} x expert {expert} x tensor {tensor}"
            raise InputError(f"mesh: {given} does not divide the {len(devices)} devices")
        fsdp = len(devices) // others
    if others * fsdp != len(devices):
        raise InputError(
            f"mesh: replica {replica} x fsdp {fsdp} x expert {expert} x tensor {tensor} = "
            f"{others * fsdp} devices, but there are {len(devices)}"
        )
    if devices[0].platform == "tpu":
        array = _on_torus(devices, {"tensor": tensor, "expert": expert, "replica": replica})
    else:
        sizes = {"replica": replica, FSDP_AXES[0]: fsdp, "expert": expert, "tensor": tensor}
        shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _on_torus(devices: Sequence[jax.Device], sizes: dict[str, int]) -> np.ndarray:
    """Arrange devices as MESH_AXES; of each dimension of the torus FSDP gets what `sizes` leave of it."""
    torus = _torus(devices)
    parts = split_torus(torus.shape, sizes)
    axes = [axis for dimension in parts for axis, _ in dimension]
    array = torus.reshape([size for dimension in parts for _, size in dimension])
    order = sorted(range(len(axes)), key=lambda place: MESH_AXES.index(axes[place]))
    shape = [math.prod(array.shape[place] for place in order if axes[place] == axis) for axis in MESH_AXES]
    return array.transpose(order).reshape(shape)


def _torus(devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices as [slice, x, y, z, core of a chip]."""
    slices = [getattr(device, "slice_index", 0) for device in devices]  # compile-only devices have one slice, unnamed
    places = np.array(
        [(*[part], *device.coords, device.core_on_chip) for part, device in zip(slices, devices, strict=True)]
    )
    array = np.array(devices, dtype=object)[np.lexsort(places.T[::-1])]
    return array.reshape(places.max(axis=0) - places.min(axis=0) + 1)


def split_torus(shape: Sequence[int], sizes: dict[str, int]) -> list[list[tuple[str, int]]]:
    """Divide the dimensions [slice, x, y, z, core] among mesh axes.

    An axis takes a dimension that it fills, else a part of one that it divides, else parts of several. Tensor
    parallelism looks from the innermost dimension on, replicas from the outermost.

    Args:
      sizes: mesh axes and their sizes, the first to choose first; their product divides that of `shape`.

    Returns:
      for each dimension its parts (mesh axis, size), outermost first; FSDP has what is left over.
    """
    left, taken = list(shape), [[] for _ in shape]
    for axis, size in sizes.items():
        order = list(range(len(shape)))
        if axis != "replica":
            order.reverse()
        order.sort(key=lambda place: (left[place] != size, left[place] % size != 0))
        for place in order:
            part = math.gcd(size, left[place])
            size, left[place] = size // part, left[place] // part
            taken[place].insert(0, (axis, part))
    outer, x, y, z, core = range(5)
    rest = {outer: FSDP_AXES[0], x: FSDP_AXES[0], y: FSDP_AXES[1], z: FSDP_AXES[2], core: FSDP_AXES[2]}
    return [[(rest[place], left[place]), *taken[place]] for place in range(5)]
