"""A plan: a compiled step with what it costs and whether it fits."""

from __future__ import annotations

import dataclasses

from jaxllm.config import RunConfig
from jaxllm.plan.analysis import Analysis, analyze
from jaxllm.plan.compile import Tick, compile_step, plan_computation
from jaxllm.plan.memory import MemorySplit, split_memory
from jaxllm.plan.topology import Topology
from jaxllm.plan.types import CompiledStep


@dataclasses.dataclass(frozen=True)
class Plan:
    """What training a configuration on a topology would be.

    Attributes:
      analysis: None where the step does not fit and so was not compiled to its end.
    """

    step: CompiledStep
    memory: MemorySplit
    analysis: Analysis | None

    @property
    def fits(self) -> bool:
        """Whether the step fits the device's memory."""
        return self.memory.fits


def make_plan(config: RunConfig, topology: Topology, tick: Tick | None = None) -> Plan:
    """Compile the training step that `jaxllm train` would run on a topology, and read what it costs.

    Args:
      tick: called several times a second while it compiles.

    Raises:
      InputError: the compiler is missing, or configuration, model and mesh do not fit each other.
    """
    step = compile_step(plan_computation(config, topology), topology, tick)
    return Plan(step, split_memory(step), analyze(step) if step.hlo else None)
