"""Measure the kernels: what the TPU compiler's schedule says of them, tiles and bytes by mask, and time on a device.

    python scripts/bench_kernels.py [--chips v5e v5p v6e] [--tiles 512x512 1024x512] [--out docs/benchmarks]

Writes kernels_static.{json,md} by compiling for chips that are not there (extra [plan]) and, where a TPU or GPU is,
kernels_DEVICE.{json,md} with the times of our kernels, of jax's own and, on a GPU, of cuDNN's, taken in one run.
docs/benchmarks/kernels.md says how to read them. `--only` does part of it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import kernel_schedule
from kernel_schedule import CORES, Body, Core

from jaxllm.errors import EXIT_BAD_INPUT, EXIT_OK, InputError

# jax and what imports it is imported in functions: a process that compiles for a chip first sets jax's environment.

PARTS = ("schedule", "grouped", "tiles", "bytes", "device")
TILES = ((256, 256), (512, 512), (1024, 512), (1024, 1024))


def schedule_rows(chip: str, tiles: Sequence[tuple[int, int]]) -> Iterator[dict]:
    """Yield what the compiler makes of the attention kernels and, before them, of plain matmuls on one chip."""
    import kernel_cases

    core = kernel_schedule.CORES[chip]
    with kernel_schedule.compiler(chip) as compile_case:
        (bodies,) = compile_case(kernel_cases.matmul_case).kernels.values()
        plain = max(bodies, key=lambda body: body.products)
        plain_share = plain.bound(core) / plain.cycles
        yield {"chip": chip, "kernel": "XLA matmul 4096", "full": _figures(plain, core, plain_share)}
        for (name, (dims, masked)), tile in itertools.product(kernel_cases.FLASH.items(), tiles):
            flops = 2 * tile[0] * tile[1] * sum(dims)
            row = {"chip": chip, "tile": list(tile), "heads": name}
            if not masked:
                (bodies,) = compile_case(functools.partial(kernel_cases.products_case, dims, tile)).kernels.values()
                yield row | {"kernel": "two products", "full": _figures(bodies[-1], core, plain_share, flops)}
            kernels = compile_case(functools.partial(kernel_cases.flash_case, dims, masked, tile)).kernels
            for kernel, counts in kernel_cases.WIDTHS.items():
                (bodies,) = (found for label, found in kernels.items() if f"jaxllm_flash_{kernel}" in label)
                flops = 2 * tile[0] * tile[1] * (counts[0] * dims[0] + counts[1] * dims[1])
                found = {label: _figures(body, core, plain_share, flops) for label, body in _labelled(bodies).items()}
                yield row | {"kernel": kernel} | found


def _labelled(bodies: Sequence[Body]) -> dict[str, Body]:
    """Tell a kernel's bodies: cut ones do three quarters of the products, full ones select less than partial ones."""
    most = max(body.products for body in bodies)
    full, partial = sorted((body for body in bodies if body.products == most), key=lambda body: body.selects)
    cut = [body for body in bodies if body.products < most]
    slowest = {"cut": max(cut, key=lambda body: body.cycles)} if cut else {}
    return {"full": full, "partial": partial} | slowest


def _figures(body: Body, core: Core, plain_share: float, flops: float | None = None) -> dict:
    share = body.bound(core) / body.cycles
    figures = {
        "cycles": body.cycles,
        "stalls": body.stalls,
        "selects": body.selects,
        "mxu_share": share,
        "of_plain_matmul": share / plain_share,
        "spill_stores": body.slots["VSTORE:SPILL"],
        "spill_loads": body.slots["VLOAD:FILL"],
        "fullest_slot": list(body.fullest),
    }
    return figures if flops is None else figures | {"of_peak": flops / (body.cycles * core.flops_per_cycle)}


def grouped_rows(chip: str) -> Iterator[dict]:
    """Yield what each grouped matmul, with its gradients, takes on one chip: memory, and its innermost bodies."""
    import kernel_cases

    core = CORES[chip]
    with kernel_schedule.compiler(chip) as compile_case:
        for name in kernel_cases.GROUPED_MATMULS:
            schedule = compile_case(functools.partial(kernel_cases.grouped_case, name))
            for kernel, bodies in schedule.kernels.items():
                body = max(bodies, key=lambda body: body.products)
                yield {
                    "chip": chip,
                    "grouped_matmul": name,
                    "kernel": kernel,
                    "temporary_kib": schedule.temporary_bytes / 2**10,
                    "cycles": body.cycles,
                    "mxu_share": body.bound(core) / body.cycles,
                }


_TILE = "{tile[0]}x{tile[1]}"
COLUMNS = {
    "schedule": {
        "chip": "{chip}",
        "kernel": "{kernel}",
        "heads": "{heads}",
        "tile": _TILE,
        "full: cycles": "{full[cycles]}",
        "MXU share": "{full[mxu_share]:.0%}",
        "of plain matmul": "{full[of_plain_matmul]:.0%}",
        "of peak": "{full[of_peak]:.0%}",
        "spill st/ld": "{full[spill_stores]}/{full[spill_loads]}",
        "fullest slot": "{full[fullest_slot][0]} {full[fullest_slot][1]:.0%}",
        "partial: cycles": "{partial[cycles]}",
        "partial MXU share": "{partial[mxu_share]:.0%}",
        "partial spill st/ld": "{partial[spill_stores]}/{partial[spill_loads]}",
        "cut: cycles": "{cut[cycles]}",
    },
    "grouped": {
        "chip": "{chip}",
        "grouped matmul": "{grouped_matmul}",
        "program": "`{kernel}`",
        "body: cycles": "{cycles}",
        "MXU share": "{mxu_share:.0%}",
        "temporaries, KiB": "{temporary_kib:.0f}",
    },
    "tiles": {
        "T": "{length}",
        "tile": _TILE,
        "mask": "{mask}",
        "visited": "{visited}",
        "full": "{full}",
        "partial": "{partial}",
        "of those cut": "{cut}",
        "fewest: visited": "{fewest[visited]}",
        "full of fewest": "{fewest[full]}",
        "causal / this": "{causal_over_this:.1f}",
    },
    "bytes": {
        "T": "{length}",
        "tile": _TILE,
        "mask": "{mask}",
        "forward MB": "{forward_mb:.0f}",
        "backward MB": "{backward_mb:.0f}",
        **{f"ms on {chip}": f"{{milliseconds[{chip}][0]:.2f}} + {{milliseconds[{chip}][1]:.2f}}" for chip in CORES},
    },
    "device": {
        "device": "{device}",
        "attention": "{implementation}",
        "T": "{length}",
        "pass": "{pass}",
        "ms": "{milliseconds:.3f}",
        "TFLOP/s": "{tflops:.1f}",
        "of peak": "{of_peak:.0%}",
        "error": "{error}",
    },
}
"""Headings of the tables, and how a row fills them; what a row does not have stays empty."""


def as_markdown(title: str, parts: dict[str, list[dict]]) -> str:
    """Return a document with one table for each part."""
    lines = [f"# {title}", "", "Written by scripts/bench_kernels.py; kernels.md says how to read it."]
    for part, rows in parts.items():
        columns = COLUMNS[part]
        lines += ["", f"## {part.capitalize()}", "", *(_line(cells) for cells in (columns, ["---"] * len(columns)))]
        lines += [_line(_cell(pattern, row) for pattern in columns.values()) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(pattern: str, row: dict) -> str:
    try:
        return pattern.format(**row)
    except KeyError:
        return ""


def write(folder: Path, name: str, title: str, parts: dict[str, list[dict]]) -> None:
    """Write NAME.json and NAME.md, each old or new as a whole.

    Raises:
      InputError: a file cannot be written.
    """
    about = {"date": datetime.date.today().isoformat(), "versions": _versions()}
    contents = {"json": json.dumps(about | parts, indent=1) + "\n", "md": as_markdown(title, parts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, content in contents.items():
            temporary = folder / f".{name}.{ending}"
            with temporary.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / f"{name}.{ending}")
    except OSError as error:
        raise InputError(f"--out: {folder}: {error.strerror}") from error


def _versions() -> dict[str, str]:
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {package: found[package] for package in ("jax", "jaxlib", "libtpu") if package in found}


def parse_tile(text: str) -> tuple[int, int]:
    """Read "512x1024", queries x keys.

    Raises:
      InputError: not two multiples of 128 that divide the lengths measured.
    """
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    tile = tuple(map(int, found.groups())) if found else (0, 0)
    if not all(size and size % 128 == 0 and 4096 % size == 0 for size in tile):
        raise InputError(f"--tiles: found {text!r}, expected QUERIESxKEYS, multiples of 128 that divide 4096")
    return tile


def measure(chips: Sequence[str], tiles: Sequence[tuple[int, int]], parts: Sequence[str], out: Path) -> None:
    """Measure the parts and write their tables."""
    static: dict[str, list[dict]] = {}
    for part, rows in (("schedule", functools.partial(schedule_rows, tiles=tiles)), ("grouped", grouped_rows)):
        if part in parts:
            static[part] = [row for chip in chips for row in rows(chip)]
    if "tiles" in parts or "bytes" in parts:
        import kernel_tiles

        static["tiles"] = list(kernel_tiles.tile_rows(tiles))
        static["bytes"] = list(kernel_tiles.byte_rows(static["tiles"]))
    if static:
        write(out, "kernels_static", "Kernels, from the compiler's schedules and by formula", static)
    if "device" in parts:
        measure_device(out)


def measure_device(out: Path) -> None:
    """Time attention on the default device and write its tables; on a CPU there is nothing to time."""
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        print("no TPU or GPU is here: no times are taken", file=sys.stderr)
        return
    import kernel_timing

    name = re.sub(r"\W+", "_", kind).strip("_").lower()
    write(out, f"kernels_{name}", f"Kernels on {kind}", {"device": list(kernel_timing.timings())})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chips", nargs="+", default=list(CORES), metavar="CHIP", help=f"of {', '.join(CORES)}")
    parser.add_argument("--tiles", nargs="+", default=[f"{q}x{k}" for q, k in TILES], metavar="QUERIESxKEYS")
    parser.add_argument(
        "--only", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the tables")
    args = parser.parse_args(arguments)
    try:
        for chip in args.chips:
            kernel_schedule.find_core(chip)
        measure(args.chips, [parse_tile(text) for text in args.tiles], args.only, args.out)
    except InputError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
