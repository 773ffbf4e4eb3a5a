"""What the planner's parts hand to each other."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from jaxllm.config import RunConfig
from jaxllm.plan.topology import Topology
from jaxllm.spec import ModelSpec
from jaxllm.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class CompilerMemory:
    """What the compiler says of one device's main memory, in bytes.

    Attributes:
      arguments: state, frozen weights and batch. outputs: new state and metrics.
      aliased: outputs that take the place of arguments.
      temporaries: everything that lives only within the step.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int = 0

    @property
    def total(self) -> int:
        """Bytes that the step needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledStep:
    """The training step of a configuration, compiled for a topology.

    Attributes:
      config: as given, with the mesh of this plan.
      spec: the model.
      jaxpr: the traced step, before partitioning.
      hlo: the compiled module as text, "" where it does not fit and so was not compiled to the end.
      memory: per device.
      trace_seconds, compile_seconds: wall-clock time.
      state: shapes, dtypes and shardings of the training state. frozen: those of what the step reads besides, or None.
      flops_per_token: that a token owes the model, see `train.flops`.
      tokens_per_step: tokens of a global batch.
      log: what the compiler said meanwhile.
    """

    config: RunConfig
    spec: ModelSpec
    mesh: Mesh
    topology: Topology
    jaxpr: jax.extend.core.ClosedJaxpr
    hlo: str
    memory: CompilerMemory
    trace_seconds: float
    compile_seconds: float
    state: TrainState
    tokens_per_step: int
    flops_per_token: float
    frozen: Params | None = None
    log: str = ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind, size and place in the program.

    Attributes:
      kind: its HLO name, as "all-gather".
      axes: the mesh axes that it goes along.
      count: how often one step runs it, loops included.
      bytes_per_device: of the whole array: what a gather returns, what the other kinds take.
      asynchronous: the schedule goes on while it runs.
      overlapped: a matrix product, a kernel or a loop runs meanwhile.
      where: the operation of the model that asked for it.
      dtype, shape: of the whole array, of several the first.
      ici_bytes: over the busiest link of a device, each time. dcn_bytes: over its share of the network, each time.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes_per_device: int
    asynchronous: bool
    overlapped: bool
    where: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes, by arithmetic.

    Attributes:
      compute_s, hbm_s, ici_s, dcn_s: seconds that each limit alone would take.
      step_s: seconds of a step.
      binding: the limit that decides: "compute", "hbm", "ici" or "dcn".
      mfu: share of the peak that the model's own FLOPs are.
      device_flops, device_hbm_bytes: what the compiled step costs one device.
      link_bytes: in a step over the busiest link of a device, by the mesh axes that the collectives go along.
      spent: seconds of the step by the limit that decided.
    """

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    step_s: float
    binding: str
    tokens_per_second_per_chip: float
    mfu: float
    device_flops: int = 0
    device_hbm_bytes: int = 0
    link_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
