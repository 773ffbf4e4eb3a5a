"""The device mesh: its axes, their order and how configured sizes fill the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxllm.errors import InputError

MESH_AXES = ("replica", "pipeline", "fsdp", "expert", "sequence", "tensor")
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
    sizes = dict.fromkeys(MESH_AXES, 1) | {"replica": replica, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh: replica {replica} x fsdp {fsdp} x expert {expert} x tensor {tensor} = "
            f"{math.prod(sizes.values())} devices, but there are {len(devices)}"
        )
    array = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
