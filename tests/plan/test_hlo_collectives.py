"""Collectives counted in what compilers write for small programs whose collectives are known."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxllm.plan.collectives import read_collectives
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.network import Network
from jaxllm.plan.runs import list_runs

TEXTS = Path(__file__).parent / "hlo"
LAYERS, HIDDEN, WIDTH = 4, 4096, 8192
WEIGHT = 2 * HIDDEN * WIDTH


def read(name, axes, *, slices=1, switched=False):
    shape = (slices, *(size for axis, size in axes.items() if axis != "replica"))
    places = np.zeros((np.prod(shape), 5), int)
    places[:, : len(shape)] = np.stack(np.unravel_index(np.arange(len(places)), shape), axis=-1)
    module = parse_hlo((TEXTS / f"{name}.txt").read_text())
    network = Network(axes, places, (False, False, False), switched)
    return read_collectives(module, list_runs(module), network)


@pytest.fixture(scope="module")
def staged():
    """Four layers of two weights on v5e:4x4, gathered and scattered along one axis after the other."""
    return read("v5e_4x4_staged", {"x": 4, "y": 4})


def test_each_weight_is_gathered_in_each_pass_and_scattered_once(staged):
    for kind, passes in {"all-gather": 2, "reduce-scatter": 1}.items():
        found = Counter()
        for each in staged:
            if each.kind == kind:
                assert each.dtype == "bf16"
                found[each.axes, each.bytes_per_device] += each.count
        assert found == {(("x",), WEIGHT): 2 * passes * LAYERS, (("y",), WEIGHT // 4): 2 * passes * LAYERS}


def test_a_fused_all_reduce_of_which_a_part_is_kept_is_no_all_reduce(staged):
    assert {each.kind for each in staged} == {"all-gather", "reduce-scatter", "collective-permute"}
    scatters = [each for each in staged if each.kind == "reduce-scatter"]
    assert not any(each.asynchronous for each in scatters)
    assert any("transpose" in each.where for each in scatters)


def test_an_asynchronous_gather_spread_over_fusions_counts_once_and_is_hidden(staged):
    hidden = [each for each in staged if each.kind == "all-gather" and each.asynchronous]
    assert [(each.axes, each.bytes_per_device, each.count) for each in hidden] == [(("x",), WEIGHT, LAYERS)] * 2
    assert all(each.overlapped for each in hidden)
    assert {each.shape for each in hidden} == {(1, WIDTH, HIDDEN), (WIDTH, HIDDEN)}


def test_a_line_carries_all_but_the_own_part_over_one_link(staged):
    for each in staged:
        if each.kind != "collective-permute":
            assert each.ici_bytes == each.bytes_per_device * 3 / 4
        assert each.dcn_bytes == 0


@pytest.mark.parametrize(
    ("name", "asynchronous"),
    [("cpu_2x4", set()), ("h100_2x4", {"collective-permute", "all-to-all", "all-reduce"})],
)
def test_the_same_program_on_cpu_and_gpu(name, asynchronous):
    found = read(name, {"a": 2, "b": 4}, switched=True)
    counts = {each.kind: (each.axes, each.count) for each in found}
    assert counts == {
        "all-gather": (("a",), 5),
        "collective-permute": (("b",), 5),
        "reduce-scatter": (("a", "b"), 1),
        "all-to-all": (("b",), 1),
        "all-reduce": (("b",), 1),
    }
    assert len(found) == len(counts)
    assert {each.kind for each in found if each.asynchronous} == asynchronous


def test_bytes_of_the_gpu_program():
    found = {each.kind: each for each in read("h100_2x4", {"a": 2, "b": 4}, switched=True)}
    matrix, rows = 2 * 4096 * 4096, 2 * 2048 * 4096
    sizes = {
        "all-gather": matrix,
        "collective-permute": rows,
        "reduce-scatter": rows,
        "all-to-all": rows,
        "all-reduce": 2,
    }
    assert {kind: each.bytes_per_device for kind, each in found.items()} == sizes
    assert found["all-gather"].ici_bytes == matrix / 2
    assert found["all-to-all"].ici_bytes == rows * 3 / 4


def test_slices_sum_through_the_runtime():
    (found,) = read("v5e_two_slices", {"replica": 2, "x": 4}, slices=2)
    assert (found.kind, found.axes, found.count, found.asynchronous) == ("all-reduce", ("replica",), 1, True)
    assert (found.bytes_per_device, found.ici_bytes, found.dcn_bytes) == (2 * 1024 * 1024, 0, 2 * 1024 * 1024)


GROUPED = """HloModule grouped, is_scheduled=true, num_partitions=2

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%both (a: f32[8], b: f32[4]) -> (f32[8], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %all-reduce = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
  %all-gather = f32[8]{0} all-gather(%b), replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %tuple = (f32[8]{0}, f32[8]{0}) tuple(%all-reduce, %all-gather)
}

ENTRY %main (p: f32[8], q: f32[4], m: f32[8,8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %m = f32[8,8]{1,0} parameter(2)
  %start = ((f32[8]{0}, f32[4]{0}), (f32[8]{0}, f32[8]{0})) async-start(%p, %q), calls=%both
  %product = f32[8,8]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = (f32[8]{0}, f32[8]{0}) async-done(%start)
  ROOT %result = f32[8]{0} get-tuple-element(%done), index=0
}
"""


def test_collectives_wrapped_together_count_one_by_one():
    module = parse_hlo(GROUPED)
    network = Network({"a": 2}, np.array([(0, i, 0, 0, 0) for i in range(2)]), (False,) * 3, switched=True)
    found = read_collectives(module, list_runs(module), network)
    assert {(each.kind, each.bytes_per_device, each.count) for each in found} == {
        ("all-reduce", 32, 1),
        ("all-gather", 32, 1),
    }
    assert all(each.asynchronous and each.overlapped for each in found)
