"""Read the TPU compiler's final schedule of a kernel: cycles of its tile bodies, spills, use of the matrix units.

The compiler writes, for each kernel, its final bundles (what the core issues in one cycle each, with the regions of the
program they belong to) and, for each bundle, how many slots of each kind it fills. What is read from them is static:
no stall for HBM is in it and no measured time.

A bundle counts one cycle, plus what it waits for a matrix unit (MXU): the compiler spaces products closer on v5e and
v5p than the units can take them, and the core then stalls. A product of 16 bfloat16 rows holds its unit for 16 cycles
on v5e and v5p (128 x 128) and for 8 on v6e (256 x 256): 197, 459 and 918 TFLOP/s at 1.5, 1.75 and 1.75 GHz, the
datasheets' peaks. Two more may wait in a unit's queue. docs/benchmarks/kernels.md compares readings with the
compiler's own static profile.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxllm.errors import InputError

_ROWS = 16
_QUEUE = 2

SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
"""Columns of the compiler's table of slots; fills and spills are those loads and stores that the program never asked
for: a register's value parked in memory."""

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_REGION = re.compile(r"\b(Start|End) region (\d+)")
_MXU = re.compile(r"= vmatmul\S*?\.(mxu\d)\b")
_SELECT = re.compile(r"= vsel\b")
_BUNDLES_FILE = re.compile(r"-(\d+)-final_bundles\.txt$")


@dataclasses.dataclass(frozen=True)
class Core:
    """A tensor core as this reading sees it.

    Attributes:
      topology: the smallest slice of its chip. clock: cycles/s. cores: of a jax device.
      units: matrix units. width: of one, in rows and columns. hold: cycles that a product of 16 rows holds it.
    """

    topology: str
    clock: float
    cores: int
    units: int
    width: int
    hold: int

    @property
    def flops_per_cycle(self) -> float:
        """What the matrix units of one core do at most, multiply and add counted as two."""
        return self.units * 2 * _ROWS * self.width**2 / self.hold


CORES = {
    "v5e": Core("v5e:1x1", 1.5e9, cores=1, units=4, width=128, hold=16),
    "v5p": Core("v5p:1x1x1", 1.75e9, cores=2, units=4, width=128, hold=16),
    "v6e": Core("v6e:1x1", 1.75e9, cores=1, units=2, width=256, hold=8),
}


def find_core(chip: str) -> Core:
    """Return a chip's core.

    Raises:
      InputError: unknown chip.
    """
    if chip not in CORES:
        raise InputError(f"--chips: unknown chip {chip!r}; known: {', '.join(CORES)}")
    return CORES[chip]


class Body(NamedTuple):
    """One innermost region of a kernel's program that multiplies matrices.

    Attributes:
      start, end: its bundles. stalls: cycles waited for matrix units. products: of 16 rows each.
      selects: vector selects in it; a body without a mask has none. slots: filled slots by kind (SLOTS).
      fullest: the kind whose slots are filled most, and how full they are.
    """

    start: int
    end: int
    stalls: int
    products: int
    selects: int
    slots: dict[str, int]
    fullest: tuple[str, float]

    @property
    def cycles(self) -> int:
        return self.end - self.start + 1 + self.stalls

    def bound(self, core: Core) -> float:
        """Return the cycles that its products hold the matrix units, all busy."""
        return self.products * core.hold / core.units


@dataclasses.dataclass
class _Region:
    start: int
    stalls_before: int
    inner: bool = True
    end: int | None = None
    stalls: int = 0
    products: int = 0
    selects: int = 0


def read_bodies(bundles: Path, slots: Path, core: Core) -> list[Body]:
    """Return the bodies of a kernel in program order, from the compiler's two files on it.

    Raises:
      InputError: a file is not what this compiler version writes.
    """
    capacity, filled = _read_slots(slots)
    regions = [region for region in _read_regions(bundles, core) if region.inner and region.products]
    if not regions or regions[-1].end >= len(filled):
        raise InputError(f"{bundles}: expected bundles in regions with products of matrices, as libtpu 0.0.42 writes")
    return [_body(region, capacity, filled[region.start : region.end + 1]) for region in regions]


def _body(region: _Region, capacity: list[int], filled: list[list[int]]) -> Body:
    totals = [sum(column) for column in zip(*filled, strict=True)]
    shares = {kind: total / (room * len(filled)) for kind, total, room in zip(SLOTS, totals, capacity, strict=True)}
    fullest = max(shares, key=shares.get)
    return Body(
        region.start,
        region.end,
        region.stalls,
        region.products,
        region.selects,
        dict(zip(SLOTS, totals, strict=True)),
        (fullest, shares[fullest]),
    )


def _read_slots(path: Path) -> tuple[list[int], list[list[int]]]:
    """Return the slots of each kind that a bundle has, and those that each bundle fills."""
    header, _, rows = path.read_text().partition("== UTILIZATION:\n")
    kinds = [line for line in header.splitlines() if line.startswith("MXU")]
    if kinds != [", ".join(SLOTS)]:
        raise InputError(f"{path}: found slots {kinds}, expected {', '.join(SLOTS)}")
    capacity = [int(number) for number in header.splitlines()[-1].split()]
    return capacity, [[int(number) for number in row.split()] for row in rows.splitlines() if row.strip()]


def _read_regions(path: Path, core: Core) -> list[_Region]:
    """Return the regions of the program that end, each with its products and stalls, in order of their start."""
    regions: dict[str, _Region] = {}
    inside: list[str] = []
    bundle, clock = 0, _Clock(core)
    for line in path.read_text().splitlines():
        if found := _BUNDLE.match(line):
            bundle = int(found[1], 16)
        marks = _REGION.findall(line)
        for number in (number for kind, number in marks if kind == "Start"):
            regions[number] = _Region(bundle, clock.stalls)
            inside.append(number)
        units = _MXU.findall(line)
        clock.issue(bundle, units)
        for depth, number in enumerate(inside):
            regions[number].products += len(units)
            regions[number].selects += len(_SELECT.findall(line))
            regions[number].inner &= not units or depth == len(inside) - 1
        for number in (number for kind, number in marks if kind == "End" and number in inside):
            inside.remove(number)
            regions[number].end, regions[number].stalls = bundle, clock.stalls - regions[number].stalls_before
    return [region for region in regions.values() if region.end is not None]


class _Clock:
    """Plays products through the matrix units and counts how long the core waits for them."""

    def __init__(self, core: Core):
        self.stalls = 0
        self._hold = core.hold
        self._free: dict[str, int] = collections.defaultdict(int)

    def issue(self, bundle: int, units: list[str]) -> None:
        """Issue a bundle's products, each to its unit."""
        for unit in units:
            self.stalls += max(0, self._free[unit] - (bundle + self.stalls) - _QUEUE * self._hold)
            self._free[unit] = max(self._free[unit], bundle + self.stalls) + self._hold


class Schedule(NamedTuple):
    """What the compiler made of a function.

    Attributes:
      kernels: bodies of each program in it with products, by the compiler's name of it.
      temporary_bytes: memory that it needs beside arguments and results.
    """

    kernels: dict[str, list[Body]]
    temporary_bytes: int


@contextlib.contextmanager
def compiler(chip: str) -> Iterator[Callable[[Callable], Schedule]]:
    """Yield a function that compiles a case for one chip and reads its schedule, in a process of its own.

    A case is a picklable function of nothing that returns (function, arguments as ShapeDtypeStructs). libtpu takes its
    options when it is loaded, hence the process.

    Raises:
      InputError: unknown chip; or, from the function, no libtpu.
    """
    find_core(chip)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="jaxllm-schedule-") as folder,
        concurrent.futures.ProcessPoolExecutor(1, context, _prepare, (folder,)) as pool,
    ):
        yield lambda case: pool.submit(_compile, chip, Path(folder), case).result()


def _prepare(folder: str) -> None:
    """Set what libtpu reads when it is loaded: only its last passes write files, or there were thousands.

    A program from jax's cache would not be compiled, and so write none.
    """
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*"
    os.environ |= {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}


def _compile(chip: str, folder: Path, case: Callable) -> Schedule:
    import jax
    from jax.sharding import SingleDeviceSharding

    from jaxllm.plan.topology import find_devices, parse_topology

    device = find_devices(parse_topology(CORES[chip].topology))[0]
    with jax.default_device(device):  # kernels ask it for its kind
        function, shapes = case()
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in shapes]
        compiled = jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    kernels = dict(_read_folder(folder, CORES[chip]))
    shutil.rmtree(folder)
    folder.mkdir()
    return Schedule(kernels, compiled.memory_analysis().temp_size_in_bytes)


def _read_folder(folder: Path, core: Core) -> Iterable[tuple[str, list[Body]]]:
    for bundles in sorted(path for path in folder.iterdir() if _BUNDLES_FILE.search(path.name)):
        if "vmatmul" in bundles.read_text():
            stem = _BUNDLES_FILE.sub("", bundles.name)
            (slots,) = folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
            yield stem.partition("-")[2], read_bodies(bundles, slots, core)
