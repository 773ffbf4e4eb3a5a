"""A plan: a compiled step with what it costs and whether it fits."""

from __future__ import annotations

import dataclasses

from jaxllm.config import RunConfig
from jaxllm.plan.analysis import Analysis, analyze
from jaxllm.plan.compile import Tick, compile_step, plan_computation
from jaxllm.plan.memory import MemorySplit, split_memory
from jaxllm.plan.rollouts import Rollouts, compile_rollouts
from jaxllm.plan.topology import Topology
from jaxllm.plan.types import CompiledStep


@dataclasses.dataclass(frozen=True)
class Plan:
    """What training a configuration on a topology would be.

    Attributes:
      analysis: None where the step does not fit and so was not compiled to its end.
      rollouts: what answering prompts costs; None for stages that do not, and where the step does not fit.
    """

    step: CompiledStep
    memory: MemorySplit
    analysis: Analysis | None
    rollouts: Rollouts | None = None

    @property
    def fits(self) -> bool:
        """Whether the step, and the sampling of answers, fit the device's memory."""
        return self.memory.fits and (self.rollouts is None or self.rollouts.fits)


def make_plan(config: RunConfig, topology: Topology, tick: Tick | None = None) -> Plan:
    """Compile the training step that `jaxllm train` would run on a topology, and what samples; read what they cost.

    Args:
      tick: called several times a second while it compiles.

    Raises:
      InputError: the compiler is missing, or configuration, model and mesh do not fit each other.
    """
    computation = plan_computation(config, topology)
    step = compile_step(computation, topology, tick)
    if not step.hlo:
        return Plan(step, split_memory(step), None)
    return Plan(step, split_memory(step), analyze(step), compile_rollouts(computation, topology, tick))
