"""Slices of chips by name, and their devices from a compiler that has none of them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from jaxllm.errors import InputError, missing_extra
from jaxllm.plan.absent_tpu import set_up_libtpu
from jaxllm.plan.chips import Chip, find_chip

_NAME = re.compile(r"(\w+):(\d{1,5}(?:x\d{1,5})*)")
_GPUS_IN_HOST = 8
_CUBE = 4

# As a one-host machine with four chips would set them: else libtpu looks for its machine in the network, writes log
# files, and refuses to be loaded by two processes.
# What XLA asks of a GPU before it compiles (a GpuTargetConfig); the numbers are the CUDA device attributes of an H100.
_H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of a chip.

    Attributes:
      dims: chips along each dimension of a slice; for GPUs (number of GPUs,).
      num_slices: slices of that shape, joined by the data centre's network.
    """

    chip: Chip
    dims: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """The slice as users write it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.dims) * self.num_slices

    @property
    def num_devices(self) -> int:
        """Devices that jax sees, of all slices."""
        return self.num_chips * self.chip.devices

    def __str__(self) -> str:
        return self.name if self.num_slices == 1 else f"{self.num_slices} slices {self.name}"


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Read "v5p:8x8x8", "v5e:16x16", "h100:8" and the like; loads no compiler.

    Raises:
      InputError: unknown chip, or no slice of it; lists those that there are.
    """
    found = _NAME.fullmatch(text)
    if not found:
        find_chip(text.partition(":")[0])
        raise InputError(f"topology: expected CHIP:DIMENSIONS, as v5p:8x8x8, v5e:16x16 or h100:8, found {text!r}")
    chip, dims = find_chip(found[1]), tuple(int(size) for size in found[2].split("x"))
    if not _exists(chip, dims):
        raise InputError(f"topology: {text}: no such slice; {chip.name} has {_slices_of(chip)}")
    if chip.platform == "cuda" and num_slices > 1:
        raise InputError(f"topology: {text}: hosts of GPUs are no slices; name all GPUs, as h100:{16 * num_slices}")
    return Topology(chip, dims, num_slices)


def _exists(chip: Chip, dims: tuple[int, ...]) -> bool:
    total = math.prod(dims)
    if not 0 < total <= chip.most_chips:
        return False
    if chip.platform == "cuda":
        return len(dims) == 1 and (total in (1, 2, 4) or total % _GPUS_IN_HOST == 0)
    if chip.slices:
        return dims in chip.slices or dims[::-1] in chip.slices
    if len(dims) != chip.torus_dims:
        return False
    return dims in ((1, 1, 1), *_PARTS_OF_A_CUBE) or all(size % _CUBE == 0 for size in dims)


_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def _slices_of(chip: Chip) -> str:
    if chip.platform == "cuda":
        return f"1, 2, 4 or a multiple of {_GPUS_IN_HOST} GPUs, up to {chip.most_chips}"
    if chip.slices:
        return ", ".join("x".join(map(str, dims)) for dims in chip.slices)
    parts = ", ".join("x".join(map(str, dims)) for dims in _PARTS_OF_A_CUBE)
    return f"1x1x1, {parts}, and whole cubes (three multiples of {_CUBE}) of up to {chip.most_chips} chips"


def find_devices(topology: Topology) -> list[jax.Device]:
    """Return devices that one can compile for, though they are not there.

    Raises:
      InputError: the compiler is not installed, not of the version that jax needs, or does not know the slice.
    """
    if topology.chip.platform == "cuda":
        _require("jax-cuda13-plugin", "jax_cuda13_plugin", "plan-gpu", topology)
        _require("jax-cuda13-pjrt", "jax_plugins.xla_cuda13", "plan-gpu", topology)
        options = {"topology_name": "", "platform": "cuda", "topology": _hosts(topology), "target_config": _H100_TARGET}
    else:
        _require("libtpu", "libtpu", "plan", topology)
        set_up_libtpu()
        options = {"topology_name": topology.name, "platform": "tpu", **_tpu_options(topology)}
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(f"topology: {topology}: the compiler does not offer it: {error}") from error


def _tpu_options(topology: Topology) -> dict[str, object]:
    options: dict[str, object] = {}
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if math.prod(topology.dims) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores are one device, as on the machines
    return options


def _hosts(topology: Topology) -> str:
    """Return slices x hosts x devices of a host; hosts are slices, for between them lies the network."""
    per_host = min(topology.num_chips, _GPUS_IN_HOST)
    return f"{topology.num_chips // per_host}x1x{per_host}"


def _require(package: str, module: str, extra: str, topology: Topology) -> None:
    """Check that a compiler is installed in the version that this jax is made for."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise missing_extra(package, extra, f"planning for {topology.name}")
    installed, needed = importlib.metadata.version(package), _needed_version(package)
    if needed and not installed.startswith(needed):
        raise InputError(
            f"planning for {topology.name}: {package} {installed} is installed, but jax {jax.__version__} needs "
            f"{needed.removesuffix('.')}; install it with: pip install 'jaxllm[{extra}]'"
        )


def _needed_version(package: str) -> str:
    """Return how a package's version must begin for this jax."""
    if package != "libtpu":
        return jax.__version__
    requirements = importlib.metadata.requires("jax") or []
    pins = [re.match(r"libtpu==([\d.]+)\*", requirement) for requirement in requirements]
    return next((pin[1] for pin in pins if pin), "")
