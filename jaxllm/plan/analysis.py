"""Everything that is read from one compiled step."""

from __future__ import annotations

import dataclasses

from jaxllm.plan.collectives import read_collectives
from jaxllm.plan.estimate import estimate_step
from jaxllm.plan.flops import Flops, count_flops
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.kernels import state_kernel_costs
from jaxllm.plan.network import network_of
from jaxllm.plan.runs import list_runs
from jaxllm.plan.types import Collective, CompiledStep, Estimate
from jaxllm.plan.warnings import find_warnings


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a compiled step costs.

    Attributes:
      flops: of the traced program, all devices together. model_flops: what the step owes its models, see `train.flops`.
    """

    flops: Flops
    model_flops: float
    collectives: list[Collective]
    estimate: Estimate
    warnings: list[str]


def analyze(step: CompiledStep) -> Analysis:
    """Read a compiled step: FLOPs, collectives, estimated time and warnings."""
    chip = step.topology.chip
    network = network_of(step.mesh, chip)
    module = state_kernel_costs(parse_hlo(step.hlo), step.jaxpr)
    runs = list_runs(module)
    flops = count_flops(step.jaxpr)
    owed = step.tokens_per_step * step.flops_per_token
    collectives = read_collectives(module, runs, network)
    estimate = estimate_step(module, runs, collectives, network, chip, tokens=step.tokens_per_step, model_flops=owed)
    found = find_warnings(step, module, runs, collectives, flops, estimate)
    return Analysis(flops, owed, collectives, estimate, found)
