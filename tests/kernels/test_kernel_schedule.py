"""Reading the TPU compiler's schedules: a kept one, the stalls, a live one; and the benchmark's tables."""

import functools
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpu_compiler import needs_tpu_compiler

from jaxllm.errors import EXIT_BAD_INPUT, InputError
from jaxllm.plan.chips import CHIPS

# The scripts import each other, in a process of their own too, which gets this path.
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_kernels
import kernel_cases
import kernel_schedule
import kernel_tiles
from kernel_schedule import CORES

SAMPLE = Path(__file__).parents[1] / "goldens" / "kernel_schedule"
"""Of a kernel for v5e that multiplies [64, 128] by [128, 256] in one region, and again with a mask in another."""


def test_bodies_of_a_kept_schedule():
    core = CORES["v5e"]
    plain, masked = kernel_schedule.read_bodies(SAMPLE / "v5e_bundles.txt", SAMPLE / "v5e_slots.txt", core)
    for body in (plain, masked):
        # 4 times 16 rows, and 256 columns are two units' width.
        assert body.products == 4 * 2
        assert body.bound(core) == 2 * 64 * 128 * 256 / core.flops_per_cycle
        assert body.cycles == body.end - body.start + 1 + body.stalls >= body.bound(core)
        assert (body.slots["VSTORE"], body.slots["VSTORE:SPILL"], body.slots["VLOAD:FILL"]) == (16, 0, 0)
    assert plain.end < masked.start
    assert plain.selects == 0 < masked.selects
    assert plain.cycles < masked.cycles


@pytest.mark.parametrize(("name", "lines"), [("v5e_bundles.txt", 40), ("v5e_slots.txt", 30), ("v5e_slots.txt", 0)])
def test_a_schedule_that_is_not_whole_is_refused(tmp_path, name, lines):
    for file in SAMPLE.iterdir():
        kept = file.read_text().splitlines(keepends=True)
        (tmp_path / file.name).write_text("".join(kept[:lines] if file.name == name else kept))
    with pytest.raises(InputError, match="expected"):
        kernel_schedule.read_bodies(tmp_path / "v5e_bundles.txt", tmp_path / "v5e_slots.txt", CORES["v5e"])


@given(st.lists(st.lists(st.sampled_from(["mxu0", "mxu1"]), max_size=2, unique=True), min_size=1), st.integers(1, 20))
def test_the_core_waits_just_as_long_as_the_units_need(bundles, hold):
    clock = kernel_schedule._Clock(kernel_schedule.Core("", 1.0, 1, 2, 128, hold))
    for number, units in enumerate(bundles):
        clock.issue(number, units)
    most = max(sum(unit in units for units in bundles) for unit in ("mxu0", "mxu1"))
    assert len(bundles) + clock.stalls >= (most - kernel_schedule._QUEUE - 1) * hold
    assert clock.stalls <= most * hold


def test_products_far_apart_never_wait():
    clock = kernel_schedule._Clock(CORES["v6e"])
    for number in range(50):
        clock.issue(number * CORES["v6e"].hold, ["mxu0", "mxu1"])
    assert clock.stalls == 0


@pytest.mark.parametrize("chip", CORES)
def test_the_matrix_units_add_up_to_the_chips_peak(chip):
    core = CORES[chip]
    assert core.flops_per_cycle * core.clock * core.cores == pytest.approx(CHIPS[chip].flops, rel=0.005)


@needs_tpu_compiler
def test_a_live_schedule_has_the_products_of_the_case():
    with kernel_schedule.compiler("v5e") as compile_case:
        schedule = compile_case(functools.partial(kernel_cases.products_case, (128, 128), (128, 256)))
    ((name, (body,)),) = schedule.kernels.items()
    assert name.startswith("products")
    assert body.bound(CORES["v5e"]) == 2 * 128 * 256 * (128 + 128) / CORES["v5e"].flops_per_cycle


def test_fewest_tiles_of_small_masks():
    mask = (None, None, None)
    assert kernel_tiles.fewest_tiles(64, mask, [(16, 16), (32, 16)]) == [
        {"visited": 10, "full": 6, "partial": 4},
        {"visited": 6, "full": 2, "partial": 4},
    ]
    assert kernel_tiles.fewest_tiles(64, (None, None, 16), [(16, 16)])[0]["visited"] == 7


def test_every_part_has_a_table():
    assert set(bench_kernels.COLUMNS) == set(bench_kernels.PARTS)
    text = bench_kernels.as_markdown("Times", {"device": [{"device": "X", "length": 4096, "error": "none"}]})
    assert "| X |  | 4096 |  |  |  |  | none |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chips", "v7"], "unknown chip 'v7'; known: v5e, v5p, v6e"),
        (["--tiles", "512"], "--tiles: found '512', expected QUERIESxKEYS"),
        (["--tiles", "100x512"], "--tiles: found '100x512', expected QUERIESxKEYS"),
    ],
)
def test_bad_input_is_one_message(arguments, message, tmp_path, capsys):
    assert bench_kernels.main([*arguments, "--out", str(tmp_path)]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
