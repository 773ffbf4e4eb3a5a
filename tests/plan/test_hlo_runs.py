"""Compiled programs as text: types, computations, and how often each instruction runs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.plan.hlo import Array, parse_arrays, parse_hlo
from jaxllm.plan.runs import list_runs, unknown_loops

TEXTS = Path(__file__).parent / "hlo"


def loop(start, step, direction, bound, *, step_op="add", swapped=False, body_extra=""):
    """Return a module with one loop that has no known_trip_count, as TPU compilers write it."""
    operands = "%bound, %counter" if swapped else "%counter, %bound"
    return f"""HloModule loop, is_scheduled=true, num_partitions=4

%body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %state = (s32[]{{:T(128)}}, f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %x = f32[8]{{0}} get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
  %step = s32[] constant({step})
  %next = s32[]{{:T(128)}} {step_op}(%i, %step)
  %twice = f32[8]{{0}} add(%x, %x){body_extra}
  ROOT %tuple = (s32[]{{:T(128)}}, f32[8]{{0}}, s32[]) tuple(%next, %twice, /*index=2*/%n)
}}

%condition (state: (s32[], f32[8], s32[])) -> pred[] {{
  %state.1 = (s32[]{{:T(128)}}, f32[8]{{0}}, s32[]) parameter(0)
  %counter = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %bound = s32[] get-tuple-element(%state.1), index=2
  ROOT %compare = pred[] compare({operands}), direction={direction}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copy = s32[] copy(%zero)
  %limit = s32[] constant({bound})
  %init = (s32[], f32[8]{{0}}, s32[]) tuple(%copy, %p, %limit)
  %loop = (s32[], f32[8]{{0}}, s32[]) while(%init), condition=%condition, body=%body
  ROOT %result = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


def counts(text):
    return {run.instruction.name: run.count for run in list_runs(parse_hlo(text))}


def test_types_carry_sizes_and_memory_spaces():
    arrays = parse_arrays("(f32[2,3]{1,0:T(8,128)S(1)}, (bf16[]{:S(2)}, pred[7]{0}), f8e4m3fn[5], s4[3], f32[<=4])")
    assert arrays == (
        Array("f32", (2, 3), 1),
        Array("bf16", (), 2),
        Array("pred", (7,)),
        Array("f8e4m3fn", (5,)),
        Array("s4", (3,)),
        Array("f32", (4,)),
    )
    assert [array.nbytes for array in arrays] == [24, 2, 7, 5, 2, 16]


@given(start=st.integers(-5, 5), step=st.integers(1, 4), bound=st.integers(-5, 30), swapped=st.booleans())
def test_trips_of_a_loop_upwards(start, step, bound, swapped):
    text = loop(start, step, "GT" if swapped else "LT", bound, swapped=swapped)
    assert counts(text)["twice"] == len(range(start, bound, step))


@given(start=st.integers(-5, 30), step=st.integers(1, 4), bound=st.integers(-5, 5))
def test_trips_of_a_loop_downwards(start, step, bound):
    assert counts(loop(start, step, "GE", bound, step_op="subtract"))["twice"] == len(range(start, bound - 1, -step))


@pytest.mark.parametrize(("bound", "trips"), [(0, 0), (12, 4)])
def test_trips_of_a_loop_until_equal(bound, trips):
    assert counts(loop(0, 3, "NE", bound))["twice"] == trips


def test_a_loop_that_nobody_can_count_runs_once_and_is_named():
    runs = list_runs(parse_hlo(loop(0, 3, "NE", 13)))
    assert unknown_loops(runs) == ["loop"]
    assert {run.instruction.name: run.count for run in runs}["twice"] == 1
    changing = loop(0, 1, "LT", 9).replace("%n)", "%next)")
    assert unknown_loops(list_runs(parse_hlo(changing))) == ["loop"]


@pytest.mark.parametrize(
    ("name", "trips"), [("v5e_4x4_staged", [4, 4]), ("cpu_2x4", [5]), ("h100_2x4", [5]), ("v5e_two_slices", [])]
)
def test_trip_counts_in_what_compilers_write(name, trips):
    runs = list_runs(parse_hlo((TEXTS / f"{name}.txt").read_text()))
    assert [run.trips for run in runs if run.instruction.opcode == "while"] == trips
    assert unknown_loops(runs) == []


def test_nested_loops_multiply_and_constants_reach_the_inner_one():
    inner = """
%inner_body (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %j_next = s32[] fusion(%j, %one), kind=kLoop, calls=%fused_add
  ROOT %t = (s32[], s32[]) tuple(%j_next, %m)
}

%fused_add (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%a, %b)
}

%inner_condition (s.1: (s32[], s32[])) -> pred[] {
  %s.1 = (s32[], s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%s.1), index=0
  %m.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %less = pred[] compare(%j.1, %m.1), direction=LT
}

%body """
    extra = """
  %start = s32[] constant(0)
  %inner_init = (s32[], s32[]) tuple(%start, %n)
  %inner = (s32[], s32[]) while(%inner_init), condition=%inner_condition, body=%inner_body"""
    text = loop(0, 1, "LT", 6, body_extra=extra).replace("\n%body ", inner, 1)
    assert counts(text)["j_next"] == 36


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_hlo("module @jit_f { func.func public @main() }")
