"""The time of a schedule, by hand for programs of a few instructions."""

from pathlib import Path

import numpy as np
import pytest

from jaxllm.plan.chips import CHIPS
from jaxllm.plan.collectives import read_collectives
from jaxllm.plan.estimate import (
    COLLECTIVE_LATENCY_S,
    HBM_EFFICIENCY,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    estimate_step,
)
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.network import Network
from jaxllm.plan.runs import list_runs

TEXTS = Path(__file__).parent / "hlo"
CHIP = CHIPS["v5e"]
SIDE = 4096
MATRIX = 2 * SIDE**2

PROGRAM = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (a: bf16[4096,4096], b: bf16[1024,4096]) -> bf16[4096,4096] {{
  %a = bf16[4096,4096]{{1,0:S(1)}} parameter(0)
  %b = bf16[1024,4096]{{1,0:S(1)}} parameter(1)
  {lines}
  ROOT %r = bf16[4096,4096]{{1,0:S(1)}} bitcast(%a)
}}
"""
DOT = "%d{} = bf16[4096,4096]{{1,0:S(1)}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
GATHER = "%g = bf16[4096,4096]{1,0} all-gather(%b), replica_groups={{0,1,2,3}}, dimensions={0}"
START = (
    "%s{0} = (bf16[1024,4096], bf16[4096,4096]) all-gather-start(%b), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
)
DONE = "%g{0} = bf16[4096,4096]{{1,0}} all-gather-done(%s{0})"

PRODUCT_S = 2 * SIDE**3 / (CHIP.flops * MATMUL_EFFICIENCY)
GATHER_S = MATRIX * 3 / 4 / (CHIP.ici_bandwidth * LINK_EFFICIENCY) + COLLECTIVE_LATENCY_S


def line_of(size, axes=None):
    places = np.array([(0, i, 0, 0, 0) for i in range(size)])
    return Network(axes or {"x": size}, places, (False,) * 3, switched=False)


def estimate(*lines, text=None):
    module = parse_hlo(text or PROGRAM.format(lines="\n  ".join(lines)))
    runs, network = list_runs(module), line_of(4)
    collectives = read_collectives(module, runs, network)
    return estimate_step(module, runs, collectives, network, CHIP, tokens=1000, model_flops=4 * 2 * SIDE**3)


def test_a_product_takes_its_flops_and_a_copy_its_bytes():
    found = estimate(DOT.format(1), "%c = bf16[4096,4096]{1,0} copy(%a)")
    copy_s = MATRIX / (CHIP.hbm_bandwidth * HBM_EFFICIENCY)
    assert found.step_s == pytest.approx(PRODUCT_S + copy_s)
    assert found.spent == pytest.approx({"compute": PRODUCT_S, "hbm": copy_s, "ici": 0, "dcn": 0})
    assert (found.binding, found.device_flops, found.device_hbm_bytes) == ("compute", 2 * SIDE**3, MATRIX)


def test_rates_follow_from_the_time():
    found = estimate(DOT.format(1))
    assert found.mfu == pytest.approx(MATMUL_EFFICIENCY)
    assert found.tokens_per_second_per_chip == pytest.approx(1000 / PRODUCT_S / 4)


def test_a_synchronous_gather_adds_its_time():
    found = estimate(DOT.format(1), GATHER, DOT.format(2))
    assert found.step_s == pytest.approx(2 * PRODUCT_S + GATHER_S)
    assert estimate(GATHER).binding == "ici"
    assert found.link_bytes == {"x": MATRIX * 3 / 4}
    assert found.ici_s == pytest.approx(GATHER_S - COLLECTIVE_LATENCY_S)


@pytest.mark.parametrize("products", [0, 1, 3])
def test_products_hide_a_gather_until_it_is_over(products):
    found = estimate(START.format(1), *(DOT.format(i) for i in range(products)), DONE.format(1))
    assert found.step_s == pytest.approx(max(GATHER_S, products * PRODUCT_S))
    assert found.spent["ici"] == pytest.approx(max(0.0, GATHER_S - products * PRODUCT_S))


def test_gathers_along_the_same_axis_take_turns():
    found = estimate(START.format(1), START.format(2), DONE.format(1), DONE.format(2))
    assert found.step_s == pytest.approx(2 * GATHER_S)


def test_fetching_into_the_chip_is_hidden_too():
    fetch = "%f = (bf16[4096,4096]{1,0:S(1)}, bf16[4096,4096]{1,0}, u32[]) copy-start(%h)"
    here = '%h = bf16[4096,4096]{1,0} custom-call(), custom_call_target="AllocateBuffer"'
    done = "%fetched = bf16[4096,4096]{1,0:S(1)} copy-done(%f)"
    assert estimate(here, fetch, DOT.format(1), done).step_s == pytest.approx(PRODUCT_S)
    assert estimate(here, fetch, done).step_s == pytest.approx(MATRIX / (CHIP.hbm_bandwidth * HBM_EFFICIENCY))


def test_a_loop_takes_its_trips():
    text = (TEXTS / "v5e_4x4_staged.txt").read_text()
    module = parse_hlo(text)
    runs = list_runs(module)
    places = np.array([(0, x, y, 0, 0) for x in range(4) for y in range(4)])
    network = Network({"x": 4, "y": 4}, places, (False,) * 3, switched=False)
    collectives = read_collectives(module, runs, network)
    found = estimate_step(module, runs, collectives, network, CHIP, tokens=1, model_flops=1.0)
    assert found.step_s == pytest.approx(sum(found.spent.values()))
    assert max(found.compute_s, found.ici_s) < found.step_s < found.compute_s + found.hbm_s + 1.5 * found.ici_s
    weights = 2 * 4 * 3 * 2 * 4096 * 8192  # two in each of 4 layers, three times, bf16
    permutes = {axis: sum(c.ici_bytes * c.count for c in collectives if c.axes == (axis,) and "permute" in c.kind)
                for axis in "xy"}  # fmt: skip
    assert found.link_bytes["x"] - permutes["x"] == weights * 3 / 4
    assert found.link_bytes["y"] - permutes["y"] == weights / 4 * 3 / 4


def test_the_network_between_slices_binds():
    module = parse_hlo((TEXTS / "v5e_two_slices.txt").read_text())
    runs = list_runs(module)
    places = np.array([(s, x, y, 0, 0) for s in range(2) for y in range(2) for x in range(2)])
    network = Network({"replica": 2, "x": 4}, places, (False,) * 3, switched=False)
    collectives = read_collectives(module, runs, network)
    found = estimate_step(module, runs, collectives, network, CHIP, tokens=1, model_flops=1.0)
    assert found.binding == "dcn"
    assert found.dcn_s == pytest.approx(2 * 1024**2 / (CHIP.dcn_bandwidth * LINK_EFFICIENCY))
    assert found.step_s > found.dcn_s
