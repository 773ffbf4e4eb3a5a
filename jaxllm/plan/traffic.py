"""What each instruction of a compiled module costs one device: FLOPs of matrix products, and bytes of main memory.

Bytes are the least the instruction can move: operands read once, results written once, of a slice only the slice, of
an update in place only the update, of a kernel what it states. Arrays that a TPU keeps in its on-chip memory (memory
space in the layout) are free. A matrix product too large for the chip reads some operands more often, so true traffic
is higher.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from jaxllm.plan.hlo import Array, Computation, Instruction, Module

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain"),
    *("send", "recv"),
}
_FREE_CUSTOM_CALLS = {
    *("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("PrepareAsyncCallStart", "PrepareAsyncCallDone", "GatherScatterIndicesBitpacked"),
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "ZeroCrop"),
}
_WINDOWED = {"dynamic-slice", "slice", "gather"}
_HOST = 5
"""Memory space of the host's memory."""


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs (matrix products, and what kernels state) and bytes of main memory of one run of an instruction."""

    flops: int = 0
    hbm_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes)


def work_of(module: Module, computation: Computation, instruction: Instruction, *, on_chip: bool) -> Work:
    """Return what one run of an instruction costs a device; what loops and calls contain is not in it.

    Args:
      on_chip: arrays in other memory spaces than 0 lie on the chip (TPU).
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return Work()
    if opcode == "custom-call":
        return _custom_call(computation, instruction, on_chip)
    if opcode == "fusion":
        inside = module.fused(instruction)
        return Work(_fused_flops(module, inside), _fusion_bytes(module, computation, instruction, inside, on_chip))
    return Work(_flops(computation, instruction), _bytes(computation, instruction, on_chip))


def kernels_without_cost(module: Module) -> list[str]:
    """Name the custom calls that are kernels but state no cost: their FLOPs are missing from every sum."""
    calls = [each for inside in module.computations.values() for each in inside.instructions.values()]
    return sorted(
        {
            _target(call)
            for call in calls
            if call.opcode == "custom-call" and _target(call) not in _FREE_CUSTOM_CALLS and _stated_flops(call) is None
        }
    )


def _main(array: Array, on_chip: bool) -> int:
    """Bytes that an array has in main memory."""
    return array.nbytes if array.space == 0 or not (on_chip or array.space == _HOST) else 0


def _main_of(instruction: Instruction, on_chip: bool) -> int:
    return sum(_main(array, on_chip) for array in instruction.arrays)


def _bytes(computation: Computation, instruction: Instruction, on_chip: bool) -> int:
    operands, result = computation.operands(instruction), _main_of(instruction, on_chip)
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("slice", "copy") and opcode != instruction.opcode:
        # The results: of a copy destination, source and a semaphore; of a slice source, destination, semaphore.
        destination = instruction.arrays[0 if opcode == "copy" else 1]
        source = operands[0].arrays[0]
        read = destination.nbytes if _main(source, on_chip) else 0
        return read + _main(destination, on_chip)
    if opcode in _WINDOWED:
        read = instruction.nbytes if _main_of(operands[0], on_chip) else 0
        return read + result
    if opcode == "dynamic-update-slice":
        return operands[1].nbytes * 2 if result else _main_of(operands[1], on_chip)
    if opcode == "scatter":
        updates = sum(each.nbytes for each in operands[len(operands) // 2 + 1 :])
        return 3 * updates
    if opcode != instruction.opcode:
        return sum(_main_of(each, on_chip) for each in operands) + instruction.arrays[-1].nbytes
    return sum(_main_of(each, on_chip) for each in operands) + result


def _fusion_bytes(
    module: Module, computation: Computation, fusion: Instruction, inside: Computation, on_chip: bool
) -> int:
    """Return the bytes of a fusion; what it only hands on (results that are operands) is not moved."""
    aliasing = fusion.attribute(r"output_to_operand_aliasing=\{(.*?\})\}") or ""
    aliases = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", aliasing)
    passed_results = {int(result or 0) for result, _ in aliases}
    passed_operands = {int(operand) for _, operand in aliases}
    total = 0
    for index, operand in enumerate(computation.operands(fusion)):
        if index not in passed_operands and _main_of(operand, on_chip):
            total += min(operand.nbytes, _read(module, inside, inside.parameters[index]))
    roots = [inside.root.name] if inside.root.opcode != "tuple" else inside.root.operands
    for index, (array, root) in enumerate(zip(fusion.arrays, roots, strict=False)):
        if index not in passed_results and _main(array, on_chip):
            total += min(array.nbytes, _written(inside, root, array.nbytes))
    return total


def _read(module: Module, inside: Computation, name: str) -> int:
    """Return how many bytes of a parameter a fused computation reads: of slices only the slices."""
    total = 0
    for user in inside.instructions.values():
        for place in [place for place, operand in enumerate(user.operands) if operand == name]:
            if user.opcode in _WINDOWED and place == 0:
                total += user.nbytes
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += _read(module, inside, user.name)
            elif user.opcode == "fusion":
                nested = module.fused(user)
                total += _read(module, nested, nested.parameters[place])
            elif user.opcode != "dynamic-update-slice" or place != 0:
                total += inside.instructions[name].nbytes
    return total


def _written(inside: Computation, name: str, whole: int) -> int:
    """Return how many bytes of a result a fused computation writes: of an update in place only the update."""
    instruction = inside.instructions[name]
    if instruction.opcode == "bitcast":
        return _written(inside, instruction.operands[0], whole)
    if instruction.opcode == "dynamic-update-slice":
        return inside.instructions[instruction.operands[1]].nbytes
    return whole


def _custom_call(computation: Computation, call: Instruction, on_chip: bool) -> Work:
    if _target(call) in _FREE_CUSTOM_CALLS:
        return Work()
    moved = sum(_main_of(each, on_chip) for each in computation.operands(call)) + _main_of(call, on_chip)
    stated = call.attribute(r'"cost_estimate":\{[^}]*?"bytes_accessed":"?(\d+)')
    return Work(_stated_flops(call) or _gemm_flops(computation, call), int(stated) if stated else moved)


def _target(call: Instruction) -> str:
    return call.attribute(r'custom_call_target="([^"]*)"') or ""


def _stated_flops(call: Instruction) -> int | None:
    """Return the FLOPs of a kernel's cost estimate (Pallas), 0 for a library's matrix product, None for none."""
    if found := call.attribute(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)'):
        return int(found)
    return 0 if "gemm" in _target(call) or "matmul" in _target(call) else None


def _gemm_flops(computation: Computation, call: Instruction) -> int:
    """Return the FLOPs of a cuBLAS matrix product."""
    dims = call.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    if dims is None:
        return 0
    left = computation.operands(call)[0].arrays[0]
    return 2 * call.arrays[0].size * math.prod(left.dims[int(dim)] for dim in re.findall(r"\d+", dims))


def _fused_flops(module: Module, inside: Computation) -> int:
    return sum(_flops(each, instruction) for each, instruction in _all_fused(module, inside))


def _all_fused(module: Module, inside: Computation) -> Iterator[tuple[Computation, Instruction]]:
    for instruction in inside.instructions.values():
        yield inside, instruction
        if instruction.opcode == "fusion":
            yield from _all_fused(module, module.fused(instruction))


def _flops(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        left = computation.operands(instruction)[0].arrays[0]
        contracted = re.findall(r"\d+", instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        return 2 * instruction.arrays[0].size * math.prod(left.dims[int(dim)] for dim in contracted)
    if instruction.opcode == "convolution":
        left, right = (each.arrays[0] for each in computation.operands(instruction))
        return _convolution_flops(instruction, left, right)
    return 0


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """Return the FLOPs of a convolution that meet real elements: neither padding nor the holes of dilation.

    TPU compilers write matrix products as convolutions whose windows mostly hang over the edge, so this matters.
    """
    lhs, rhs, out = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute(r"dim_labels=(\S+?),?(?:\s|$)")).groups()
    result = instruction.arrays[0]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    pairs = 1
    spatial = sorted(label for label in out if label.isdigit())
    for place, label in enumerate(spatial):
        option = {key: value.split("x")[place] for key, value in window.items()}
        pairs *= _window_pairs(
            size_in=left.dims[lhs.index(label)],
            size_out=result.dims[out.index(label)],
            size_kernel=right.dims[rhs.index(label)],
            stride=int(option.get("stride", 1)),
            pad=int(option.get("pad", "0_0").rsplit("_", 1)[0]),
            dilate_in=int(option.get("lhs_dilate", 1)),
            dilate_kernel=int(option.get("rhs_dilate", 1)),
        )
    outputs = result.dims[out.index("b")] * result.dims[out.index("f")]
    return 2 * outputs * right.dims[rhs.index("i")] * pairs


def _window_pairs(
    *, size_in: int, size_out: int, size_kernel: int, stride: int, pad: int, dilate_in: int, dilate_kernel: int
) -> int:
    """Count the pairs (output, kernel position) along one dimension that read an input element."""
    at = np.arange(size_out)[:, None] * stride + np.arange(size_kernel)[None, :] * dilate_kernel - pad
    inside = (at >= 0) & (at <= (size_in - 1) * dilate_in) & (at % dilate_in == 0)
    return int(np.count_nonzero(inside))
