"""What the chips can do: the limits that plans are measured against.

Sources: jax's own table (jax/_src/pallas/mosaic/tpu_info.py) for FLOP/s and VMEM; cloud.google.com/tpu/docs (v4, v5e,
v5p, v6e, tpu7x) for memory and networks; scaling-book (jax-ml.github.io) for what is said of one link; NVIDIA's H100
datasheet. The memory that a program may use on a TPU is what the compiler itself allows (libtpu 0.0.42).
"""

from __future__ import annotations

import dataclasses

from jaxllm.errors import InputError

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; numbers are for one jax device, of which TPU7x has two on a chip.

    Attributes:
      flops: dense bf16 FLOP/s, multiply and add counted as two.
      hbm_bytes: main memory that a program may use. hbm_bandwidth: bytes/s.
      vmem_bytes: on-chip memory that a kernel may use (H100: shared memory of one SM).
      ici_bandwidth: bytes/s of one link in one direction. A GPU has one, to the switch of its host.
      ici_links: links of a chip, two along each dimension of its torus.
      dcn_bandwidth: bytes/s of a device's share of its host's network, in one direction.
      clock: cycles/s of the matrix units, derived from `flops`: v4 and v5p have 8 of 128 x 128, v5e 4 of them, v6e and
        each half of a TPU7x 4 of 256 x 256.
      torus_dims: dimensions of its torus; 0: the devices of a host are joined by a switch.
      devices: jax devices of a chip.
      slices: the slices that are sold of a two-dimensional torus; () where whole cubes are combined freely.
      most_chips: chips of the largest slice.
    """

    name: str
    platform: str = "tpu"
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    vmem_bytes: int
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float
    clock: float
    torus_dims: int
    devices: int = 1
    slices: tuple[tuple[int, ...], ...] = ()
    most_chips: int


_PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))

_KNOWN = (
    Chip(
        name="v4",
        flops=275e12,
        hbm_bytes=int(30.75 * _GIB),
        hbm_bandwidth=1.23e12,
        vmem_bytes=16 * 2**20,
        ici_bandwidth=50e9,
        ici_links=6,
        dcn_bandwidth=6.25e9,
        clock=1.05e9,
        torus_dims=3,
        most_chips=4096,
    ),
    Chip(
        name="v5e",
        flops=197e12,
        hbm_bytes=int(15.75 * _GIB),
        hbm_bandwidth=0.82e12,
        vmem_bytes=128 * 2**20,
        ici_bandwidth=50e9,
        ici_links=4,
        dcn_bandwidth=3.125e9,
        clock=1.5e9,
        torus_dims=2,
        slices=_PLANES,
        most_chips=256,
    ),
    Chip(
        name="v5p",
        flops=459e12,
        hbm_bytes=int(95.74 * _GIB),
        hbm_bandwidth=2.765e12,
        vmem_bytes=64 * 2**20,
        ici_bandwidth=100e9,
        ici_links=6,
        dcn_bandwidth=6.25e9,
        clock=1.75e9,
        torus_dims=3,
        most_chips=6144,
    ),
    Chip(
        name="v6e",
        flops=920e12,
        hbm_bytes=int(31.25 * _GIB),
        hbm_bandwidth=1.64e12,
        vmem_bytes=128 * 2**20,
        ici_bandwidth=100e9,
        ici_links=4,
        dcn_bandwidth=12.5e9,
        clock=1.75e9,
        torus_dims=2,
        slices=_PLANES,
        most_chips=256,
    ),
    Chip(
        name="tpu7x",
        flops=2310e12 / 2,
        hbm_bytes=int(94.75 * _GIB),
        hbm_bandwidth=7.4e12 / 2,
        vmem_bytes=64 * 2**20,
        ici_bandwidth=100e9,
        ici_links=6,
        dcn_bandwidth=12.5e9 / 2,
        clock=2.2e9,
        torus_dims=3,
        devices=2,
        most_chips=9216,
    ),
    Chip(
        name="h100",
        platform="cuda",
        flops=989e12,
        # With XLA_PYTHON_CLIENT_MEM_FRACTION=0.92; jax's default, 0.75, wastes a quarter of a GPU that trains.
        hbm_bytes=int(0.92 * 81559 * 2**20),
        hbm_bandwidth=3.35e12,
        vmem_bytes=227 * 2**10,
        ici_bandwidth=450e9,
        ici_links=1,
        dcn_bandwidth=50e9,
        clock=1.83e9,
        torus_dims=0,
        most_chips=8 * 1024,
    ),
)

CHIPS = {chip.name: chip for chip in _KNOWN}


def find_chip(name: str) -> Chip:
    """Return a chip by its short name, as "v5p".

    Raises:
      InputError: lists those that are known.
    """
    if name not in CHIPS:
        raise InputError(f"topology: unknown chip {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]
