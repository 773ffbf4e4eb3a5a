"""How often each instruction of a compiled module runs.

Trip counts of loops are read from `known_trip_count` where the compiler wrote it (CPU, GPU), and else worked out from
the loop's own arithmetic (TPU): the counter's start, step and bound, as far as they are constants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jaxllm.plan.hlo import Computation, Instruction, Module

Constants = Mapping[int, int]
"""The elements of a loop's state that are known integers and that the loop does not change."""

_SAME_VALUE = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape"}


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how often one execution of the module runs it, on each device.

    Attributes:
      computation: where it stands.
      trips: of a while loop, how often its body runs each time; None where that is no constant, or it is no loop.
      within: the async-start that wraps it, and where that stands.
    """

    instruction: Instruction
    computation: Computation
    count: int
    trips: int | None = None
    within: tuple[Instruction, Computation] | None = None


def list_runs(module: Module) -> list[Run]:
    """List every instruction that runs by itself, in the order of the text; loops and calls are entered, fusions not.

    Bodies of loops without a known trip count run once here (see `unknown_loops`). All branches of a conditional
    count, which is an upper bound.
    """
    return list(_walk(module, module.computations[module.entry], 1, {}, None))


def unknown_loops(runs: Sequence[Run]) -> list[str]:
    """Name the loops whose trip count is unknown."""
    unknown = [run.instruction for run in runs if run.instruction.opcode == "while" and run.trips is None]
    return [loop.op_name or loop.name for loop in unknown]


def _walk(
    module: Module,
    computation: Computation,
    count: int,
    state: Constants,
    within: tuple[Instruction, Computation] | None,
) -> Iterator[Run]:
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            body = module.computations[instruction.calls["body"][0]]
            constants = _loop_constants(module, computation, instruction, state)
            trips = _trip_count(module, computation, instruction, state, constants)
            yield Run(instruction, computation, count, trips, within)
            yield from _walk(module, body, count * (1 if trips is None else trips), constants, within)
            continue
        yield Run(instruction, computation, count, None, within)
        if opcode in ("call", "conditional", "async-start"):
            wrapper = (instruction, computation) if opcode == "async-start" else within
            for name in [name for names in instruction.calls.values() for name in names]:
                yield from _walk(module, module.computations[name], count, {}, wrapper)


@dataclasses.dataclass(frozen=True)
class _Value:
    """An integer: `offset`, or an element of a loop's state plus `offset`."""

    element: int | None
    offset: int


def _value(
    module: Module,
    computation: Computation,
    name: str,
    state: Constants,
    arguments: Sequence[_Value | None] | None = None,
) -> _Value | None:
    """Return the integer that an instruction yields, None where it is more than a constant or a state's element.

    Args:
      state: constants among the state, which is the computation's only parameter.
      arguments: in a fused computation, the values of its parameters instead.
    """
    instruction = computation.instructions[name]
    opcode = instruction.opcode

    def operand(index: int) -> _Value | None:
        return _value(module, computation, instruction.operands[index], state, arguments)

    if opcode == "constant":
        text = instruction.inside.strip()
        return _Value(None, int(text)) if text.lstrip("-").isdigit() else None
    if opcode == "parameter" and arguments is not None:
        return arguments[int(instruction.inside)]
    if opcode in _SAME_VALUE:
        return operand(0)
    if opcode in ("add", "subtract"):
        left, right = operand(0), operand(1)
        if left is None or right is None:
            return None
        if opcode == "subtract":
            return None if right.element is not None else _Value(left.element, left.offset - right.offset)
        elements = [each.element for each in (left, right) if each.element is not None]
        return None if len(elements) > 1 else _Value(elements[0] if elements else None, left.offset + right.offset)
    if opcode == "fusion":
        inside = module.fused(instruction)
        given = [operand(index) for index in range(len(instruction.operands))]
        return _value(module, inside, inside.root.name, {}, given)
    if opcode == "get-tuple-element":
        return _element(module, computation, instruction, state)
    return None


def _element(module: Module, computation: Computation, instruction: Instruction, state: Constants) -> _Value | None:
    """Return the value of a get-tuple-element of the state or of a tuple that was just built."""
    index = int(instruction.attribute(r"index=(\d+)"))
    source = computation.instructions[instruction.operands[0]]
    if source.opcode == "parameter":
        return _Value(None, state[index]) if index in state else _Value(index, 0)
    if source.opcode == "tuple":
        return _value(module, computation, source.operands[index], state)
    return None


def _loop_constants(module: Module, computation: Computation, loop: Instruction, state: Constants) -> dict[int, int]:
    """Return the elements of a loop's state that start as known integers and that its body hands on unchanged."""
    start = computation.instructions[loop.operands[0]]
    body = module.computations[loop.calls["body"][0]]
    if start.opcode != "tuple" or body.root.opcode != "tuple":
        return {}
    constants = {}
    for index, (name, array) in enumerate(zip(start.operands, loop.arrays, strict=False)):
        if array.dims:
            continue
        value = _value(module, computation, name, state)
        if value is not None and value.element is None:
            after = _value(module, body, body.root.operands[index], {})
            if after == _Value(index, 0):
                constants[index] = value.offset
    return constants


def _trip_count(
    module: Module, computation: Computation, loop: Instruction, state: Constants, constants: Constants
) -> int | None:
    """Return how often a loop's body runs, None where that is no constant."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition = module.computations[loop.calls["condition"][0]]
    body = module.computations[loop.calls["body"][0]]
    start = computation.instructions[loop.operands[0]]
    comparison = _comparison(module, condition, constants)
    if comparison is None or start.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    direction, counter, bound = comparison
    first = _value(module, computation, start.operands[counter.element], state)
    after = _value(module, body, body.root.operands[counter.element], constants)
    if first is None or first.element is not None or after is None or after.element != counter.element:
        return None
    return _steps(first.offset + counter.offset, after.offset, direction, bound.offset)


def _comparison(module: Module, condition: Computation, constants: Constants) -> tuple[str, _Value, _Value] | None:
    """Return (direction, counter, bound) of a loop's condition."""
    root, inside, arguments = condition.root, condition, None
    if root.opcode == "fusion":
        arguments = [_value(module, condition, name, constants) for name in root.operands]
        inside = module.fused(root)
        root = inside.root
    if root.opcode != "compare":
        return None
    left, right = (_value(module, inside, name, constants, arguments) for name in root.operands)
    direction = root.attribute(r"direction=(\w+)")
    if left is None or right is None:
        return None
    if left.element is None:
        left, right, direction = right, left, {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    return (direction, left, right) if left.element is not None and right.element is None else None


def _steps(first: int, step: int, direction: str, bound: int) -> int | None:
    """Return how many of first, first + step, first + 2 step ... hold before the comparison with `bound` fails."""
    if direction in ("GT", "GE"):
        first, step, bound, direction = -first, -step, -bound, {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        trips, rest = divmod(bound - first, step) if step else (-1, 0)
        return trips if rest == 0 and trips >= 0 else None
    if direction not in ("LT", "LE") or step <= 0:
        return None
    return max(0, -(-(bound + (direction == "LE") - first) // step))
