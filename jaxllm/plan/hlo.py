"""Compiled HLO text as data: computations and their instructions.

Why text: it is the one form of a compiled program that every backend gives (`jax.stages.Compiled.as_text`), and for
TPU and GPU the order of its lines is the schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_BITS = {
    **{"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0},
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{f"f{bits}": bits for bits in (16, 32, 64)},
    **{"f4e2m1fn": 4, "f8e8m0fnu": 8},
    **{f"f8{form}": 8 for form in ("e3m4", "e4m3", "e4m3fn", "e4m3b11fnuz", "e4m3fnuz", "e5m2", "e5m2fnuz")},
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in HLO; `space` is the memory space of its layout, 0 being the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return -(-self.size * _BITS[self.dtype] // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: the result, nested tuples flattened.
      operands: names of instructions of the same computation.
      inside: what stands in the parentheses, as a constant's value.
      tail: the attributes, as text.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    tail: str

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where the program asked for it: the path of jax name scopes, "" where the compiler invented it."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @functools.cached_property
    def calls(self) -> dict[str, tuple[str, ...]]:
        """Computations that the instruction names, by attribute."""
        return {key: tuple(re.findall(r"[\w.\-]+", names)) for key, names in _CALLS.findall(self.tail)}

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of a pattern in the attributes."""
        found = re.search(pattern, self.tail)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text, which is the schedule where the module is scheduled."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(each.inside): each.name for each in self.instructions.values() if each.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions that feed one of this computation."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program, the same for all devices."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int

    def fused(self, instruction: Instruction) -> Computation | None:
        """Return the computation of a fusion, None for other instructions."""
        return self.computations[instruction.calls["calls"][0]] if instruction.opcode == "fusion" else None


def parse_hlo(text: str) -> Module:
    """Parse the text of a compiled module.

    Raises:
      ValueError: it is no HLO text with an entry computation.
    """
    computations, entry, name, root, instructions = {}, None, None, None, {}
    for line in text.splitlines():
        if name is None:
            if head := _COMPUTATION.match(line):
                name, root, instructions = head[2], None, {}
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
            name = None
        elif head := _HEAD.match(line):
            instruction = _instruction(head[2], _COMMENT.sub("", line[head.end() :]))
            instructions[instruction.name] = instruction
            root = instruction if head[1] else root
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, rest: str) -> Instruction:
    """Parse `TYPE opcode(inside), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    opcode, inside = rest[end:opening].strip(), rest[opening + 1 : closing]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, parse_arrays(rest[:end]), operands, inside, rest[closing + 1 :])


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Parse an HLO type, as `(f32[2,3]{1,0}, bf16[]{:S(2)})`, nested tuples flattened."""
    return tuple(
        Array(dtype, tuple(int(size) for size in re.findall(r"\d+", dims)), int(space or 0))
        for dtype, dims, space in _ARRAY.findall(text)
    )


def _closing(text: str, opening: int) -> int:
    """Return the place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, opening):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:100]}")
