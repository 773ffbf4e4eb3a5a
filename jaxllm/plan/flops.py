"""Exact FLOPs of a traced program, loops included: a multiply-add of a matrix product is 2, everything else is free.

`cost_analysis` of a compiled step counts a loop's body once, so scanned layers vanish in it. Here a scan counts
`length` times, a `shard_map` body once for each device it is mapped over, the larger branch of a conditional, and a
Pallas kernel what its CostEstimate says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_RECOMPUTED = "rematted_computation"
"""Name scope in which jax.checkpoint's backward pass computes the forward pass again."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one execution on all devices together.

    Attributes:
      total: what the devices compute. recomputed: the part of it that rematerialisation computes again.
      unknown: kernels without a cost estimate and loops without a known trip count, which are missing or counted once.
    """

    total: int = 0
    recomputed: int = 0
    unknown: frozenset[str] = frozenset()

    @property
    def once(self) -> int:
        """FLOPs without rematerialisation."""
        return self.total - self.recomputed

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.total + other.total, self.recomputed + other.recomputed, self.unknown | other.unknown)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.total * times, self.recomputed * times, self.unknown)


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """Count the FLOPs of a traced program (`jax.jit(f).trace(...).jaxpr`)."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = Flops()
    for equation in inner.eqns:
        flops = _equation_flops(equation)
        if _RECOMPUTED in str(equation.source_info.name_stack):
            flops = dataclasses.replace(flops, recomputed=flops.total)
        total += flops
    return total


def programs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    """Yield the programs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                yield each


def _equation_flops(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_dot_flops(equation, params["dimension_numbers"][0][0]))
    if name == "ragged_dot_general":
        return Flops(_ragged_dot_flops(equation))
    if name == "conv_general_dilated":
        kernel, features = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return Flops(2 * _size(equation.outvars[0]) * math.prod(kernel) // kernel[features])
    if name == "pallas_call":
        return _kernel_flops(equation)
    if name == "while":
        return _while_flops(equation)
    inner = [count_flops(each) for each in programs(params)]
    if name == "cond":
        return max(inner, key=lambda flops: flops.total, default=Flops())
    if name == "scan":
        return sum(inner, Flops()) * params["length"]
    if name == "shard_map":
        mesh = params["mesh"]
        return sum(inner, Flops()) * math.prod(mesh.shape[axis] for axis in _mapped_axes(params))
    return sum(inner, Flops())


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _dot_flops(equation: Any, contracted: tuple[int, ...]) -> int:
    left = equation.invars[0].aval.shape
    return 2 * _size(equation.outvars[0]) * math.prod(left[dim] for dim in contracted)


def _ragged_dot_flops(equation: Any) -> int:
    """Return the FLOPs of a grouped product whose groups fill the ragged dimension."""
    dims = equation.params["ragged_dot_dimension_numbers"]
    contracted = dims.dot_dimension_numbers[0][0]
    flops = _dot_flops(equation, contracted)
    # Contracted over the ragged dimension, each of the results sums over its own group only.
    ragged_is_contracted = set(dims.lhs_ragged_dimensions) <= set(contracted)
    return flops // equation.outvars[0].aval.shape[0] if ragged_is_contracted else flops


def _kernel_flops(equation: Any) -> Flops:
    estimate = equation.params["cost_estimate"]
    if estimate is None:
        return Flops(unknown=frozenset({f"kernel {equation.params['name']} has no cost estimate"}))
    return Flops(int(estimate.flops))


def _while_flops(equation: Any) -> Flops:
    body = count_flops(equation.params["body_jaxpr"])
    trips = _while_trips(equation)
    if trips is None and body.total:
        return body + Flops(unknown=frozenset({"a while loop without a known trip count, counted once"}))
    return body * (trips or 0)


def _while_trips(equation: Any) -> int | None:
    """Return the trips of a loop `while i < constant: i += constant`, None for other loops."""
    params = equation.params
    condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    counter, bound = condition.eqns[0].invars
    carried = list(condition.invars)[params["cond_nconsts"] :]
    if counter not in carried or not isinstance(bound, Literal):
        return None
    place = carried.index(counter)
    start = equation.invars[params["cond_nconsts"] + params["body_nconsts"] + place]
    before, after = body.invars[params["body_nconsts"] + place], body.outvars[place]
    steps = [
        int(each.invars[1].val)
        for each in body.eqns
        if each.primitive.name == "add" and after in each.outvars and each.invars[0] is before
        if isinstance(each.invars[1], Literal)
    ]
    if not steps or steps[0] <= 0 or not isinstance(start, Literal):
        return None
    return max(0, -(-(int(bound.val) - int(start.val)) // steps[0]))


def _mapped_axes(params: dict[str, Any]) -> frozenset[str]:
    return frozenset(params["newly_manual_axes"])
