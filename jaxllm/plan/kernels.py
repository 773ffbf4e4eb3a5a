"""What GPU kernels cost: the TPU compiler writes a kernel's CostEstimate into its call, the GPU compiler drops it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxllm.plan.flops import programs
from jaxllm.plan.hlo import Computation, Instruction, Module

_TARGET = "__gpu$xla.gpu.triton"

Key = tuple[str, tuple[tuple[int, ...], ...]]
"""A kernel's name and the shapes of its results, on one device."""


def state_kernel_costs(module: Module, jaxpr: ClosedJaxpr) -> Module:
    """Return the module with the cost estimates of the traced program's Pallas kernels in its Triton calls."""
    estimates = {
        (call.params["name"], tuple(tuple(result.aval.shape) for result in call.outvars)): call.params["cost_estimate"]
        for call in _kernel_calls(jaxpr.jaxpr)
    }

    def stated(instruction: Instruction) -> Instruction:
        estimate = estimates.get(_key(instruction)) if _TARGET in instruction.tail else None
        if estimate is None:
            return instruction
        numbers = f'"flops":"{int(estimate.flops)}","bytes_accessed":"{int(estimate.bytes_accessed)}"'
        return dataclasses.replace(instruction, tail=f'{instruction.tail}, {{"cost_estimate":{{{numbers}}}}}')

    def with_costs(computation: Computation) -> Computation:
        instructions = {name: stated(each) for name, each in computation.instructions.items()}
        root = instructions[computation.root.name]
        return dataclasses.replace(computation, instructions=instructions, root=root)

    computations = {name: with_costs(each) for name, each in module.computations.items()}
    return dataclasses.replace(module, computations=computations)


def _key(instruction: Instruction) -> Key:
    return instruction.attribute(r'\bname = "([^"]*)"') or "", tuple(array.dims for array in instruction.arrays)


def _kernel_calls(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for program in programs(equation.params):
                yield from _kernel_calls(program.jaxpr if isinstance(program, ClosedJaxpr) else program)
