"""What the links between devices carry: arithmetic of collectives on a torus, between slices, and on a switch.

Assumed, as the compiler does not tell:
- A collective along one dimension of the torus is a ring. Where the dimension wraps round and the group fills it, both
  directions are used (2 links), else one (1 link): the end of a line must receive everything over one link.
- A collective over several dimensions uses the links of all of them evenly.
- v4, v5p and TPU7x wrap where every dimension is a multiple of 4 (whole cubes), v5e and v6e along dimensions of 16.
- Groups that lie interleaved on the same ring share its links; so do the cores of a chip that are different devices.
- On GPUs the devices of a host are joined by a switch: each sends and receives at its full rate whatever the others do.
- Between slices (TPU) or hosts (GPU) a collective goes once per slice, split among its members there.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh

from jaxllm.plan.chips import Chip

_CUBES = {"v4", "v5p", "tpu7x"}
_WRAP_AT_16 = {"v5e", "v6e"}


@dataclasses.dataclass(frozen=True)
class LinkBytes:
    """What one collective asks of a device's busiest link in the slice (ici) and of its share of the network (dcn)."""

    ici: float = 0.0
    dcn: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Where the devices of a mesh stand.

    Attributes:
      axes: sizes of the mesh axes, slowest first.
      places: int [devices, 5]: slice (TPU) or host (GPU), x, y, z, core; devices in the order of `mesh.devices.flat`.
      wraps: for x, y, z, whether the torus closes.
      switched: the devices of a slice are joined by a switch, no torus.
    """

    axes: dict[str, int]
    places: np.ndarray
    wraps: tuple[bool, bool, bool]
    switched: bool

    @property
    def num_partitions(self) -> int:
        """Devices that a compiled module is for: each slice of a torus has a module of its own."""
        num_slices = 1 if self.switched else len(np.unique(self.places[:, 0]))
        return len(self.places) // num_slices

    def group_bytes(self, kind: str, full: float, groups: np.ndarray) -> LinkBytes:
        """Return what a collective within groups of devices moves.

        Args:
          kind: its HLO name.
          full: bytes of the whole array: what a gather returns, what the others take, on each device.
          groups: int [groups, members].
        """
        times = 2 if kind == "all-reduce" else 1
        members = self.places[groups[0]]
        num_slices = len(np.unique(members[:, 0]))
        in_slice = len(members) // num_slices
        if kind == "all-to-all":
            crossing = full * (num_slices - 1) / num_slices
        else:
            crossing = times * full / in_slice * (num_slices - 1) / num_slices
        within = members[members[:, 0] == members[0, 0]]
        local = full * len(within) / len(members) if kind == "all-to-all" else full
        return LinkBytes(ici=times * self._slice_bytes(kind, local, within), dcn=crossing)

    def permute_bytes(self, full: float, pairs: np.ndarray) -> LinkBytes:
        """Return what a collective-permute of `full` bytes moves; int pairs [n, 2] of source and target."""
        source, target = self.places[pairs[:, 0]], self.places[pairs[:, 1]]
        dcn = full if np.any(source[:, 0] != target[:, 0]) else 0.0
        if self.switched:
            return LinkBytes(ici=full if np.any(source[:, 1:] != target[:, 1:]) else 0.0, dcn=dcn)
        hops = np.abs(source - target)[:, 1:4]
        sizes = self._sizes[1:4]
        hops = np.where(np.array(self.wraps) & (hops * 2 > sizes), sizes - hops, hops)
        return LinkBytes(ici=full * float(hops.max(initial=0)), dcn=dcn)

    def across_slices(self) -> np.ndarray:
        """Return the groups of devices that stand at the same place of different slices, int [groups, slices]."""
        _, places = np.unique(self.places[:, 1:], axis=0, return_inverse=True)
        order = np.lexsort((self.places[:, 0], places.reshape(-1)))
        return order.reshape(-1, len(np.unique(self.places[:, 0])))

    def _slice_bytes(self, kind: str, full: float, members: np.ndarray) -> float:
        """Return the bytes of the busiest link for members of one slice, one phase."""
        share = (len(members) - 1) / len(members)
        if self.switched or share == 0:
            return full * share
        lanes, hops = 0.0, 0.0
        for dim in (1, 2, 3):
            values = np.unique(members[:, dim])
            if len(values) == 1:
                continue
            ways = 2 if self.wraps[dim - 1] and (len(values) * np.diff(values)[0]) == self._sizes[dim] else 1
            sharing = int(np.diff(values)[0]) * self._cores_apart(members)
            lanes += ways / sharing
            # The mean way of a message is a quarter of a ring, and half of a line must pass its middle.
            hops = max(hops, len(values) / (8 if ways == 2 else 4) * sharing)
        if lanes == 0:
            return 0.0  # cores of one chip
        return full * hops if kind == "all-to-all" else full * share / lanes

    def _cores_apart(self, members: np.ndarray) -> int:
        """Devices of one chip that are in different groups and so share its links."""
        return int(self._sizes[4]) // len(np.unique(members[:, 4]))

    @property
    def _sizes(self) -> np.ndarray:
        return self.places.max(axis=0) - self.places.min(axis=0) + 1


def network_of(mesh: Mesh, chip: Chip) -> Network:
    """Read from a mesh's devices where they stand."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "tpu":
        places = np.array([(device_slice(device), *device.coords, device.core_on_chip) for device in devices])
        sizes = (places.max(axis=0) - places.min(axis=0) + 1).tolist()
        return Network(dict(mesh.shape), places, torus_wraps(chip.name, tuple(sizes[1:4])), switched=False)
    # The compiler's GPU devices have a process for each host, unlike those of many real runs, one for each GPU.
    places = np.array([(device.process_index, device.id, 0, 0, 0) for device in devices])
    return Network(dict(mesh.shape), places, (False, False, False), switched=True)


def device_slice(device: object) -> int:
    """Return a TPU's slice; where there is one only, devices may not name it."""
    return getattr(device, "slice_index", 0)


def torus_wraps(chip: str, dims: tuple[int, int, int]) -> tuple[bool, bool, bool]:
    """Tell which dimensions of a slice close to a ring, see the assumptions above."""
    if chip in _CUBES:
        whole = math.prod(dims) > 1 and all(size % 4 == 0 for size in dims)
        return (whole, whole, whole)
    if chip in _WRAP_AT_16:
        return tuple(size == 16 for size in dims)
    return (False, False, False)
