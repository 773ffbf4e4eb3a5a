"""How long a compiled step takes: its schedule walked through with the rates of a chip.

Each instruction takes the longer of its matrix products and its memory traffic; a collective takes its busiest link's
bytes. What is asynchronous runs on while the schedule goes on, one collective at a time on the links of a mesh axis,
and only what is left when it is waited for is added. This is arithmetic, not a measurement: the shares of the peaks
that real programs reach are the assumptions below.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from jaxllm.plan.chips import Chip
from jaxllm.plan.collectives import Transfer, find_transfer, link_bytes, transfer_axes
from jaxllm.plan.hlo import Computation, Instruction, Module
from jaxllm.plan.network import LinkBytes, Network
from jaxllm.plan.runs import Run
from jaxllm.plan.traffic import Work, work_of
from jaxllm.plan.types import Collective, Estimate

MATMUL_EFFICIENCY = 0.85
"""Share of the peak that large matrix products reach. Assumed."""
HBM_EFFICIENCY = 0.85
"""Share of the datasheet's memory bandwidth that streaming reaches. Assumed."""
LINK_EFFICIENCY = 0.85
"""Share of a link's rate that payload reaches. Assumed."""
COLLECTIVE_LATENCY_S = 2e-6
"""What a collective takes however small it is: barrier and launch. Assumed."""

LIMITS = ("compute", "hbm", "ici", "dcn")


def work_seconds(chip: Chip, work: Work) -> tuple[float, float]:
    """Return the seconds of (matrix products, memory traffic) on one device."""
    return work.flops / (chip.flops * MATMUL_EFFICIENCY), work.hbm_bytes / (chip.hbm_bandwidth * HBM_EFFICIENCY)


def link_seconds(chip: Chip, links: LinkBytes) -> tuple[float, float]:
    """Return the seconds on (links of the slice, the network between slices)."""
    return links.ici / (chip.ici_bandwidth * LINK_EFFICIENCY), links.dcn / (chip.dcn_bandwidth * LINK_EFFICIENCY)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """Something asynchronous: when it ends, and what limits it."""

    end: float
    limit: str


@dataclasses.dataclass
class _Clock:
    """Time within one computation.

    Attributes:
      spent: seconds by the limit that decided. busy: when the links of mesh axes, or the memory, are free again.
    """

    now: float = 0.0
    spent: Counter[str] = dataclasses.field(default_factory=Counter)
    busy: dict[str, float] = dataclasses.field(default_factory=dict)
    pending: dict[str, _Pending] = dataclasses.field(default_factory=dict)

    def run(self, seconds: float, limit: str) -> None:
        """Let the schedule stand for some seconds."""
        self.now += seconds
        self.spent[limit] += seconds

    def begin(self, name: str, seconds: float, limit: str, resources: Sequence[str]) -> None:
        """Begin what the instruction `name` will wait for."""
        start = max([self.now, *(self.busy.get(each, 0.0) for each in resources)])
        for each in resources:
            self.busy[each] = start + seconds
        latest = _Pending(start + seconds, limit)
        self.pending[name] = max(latest, self.pending.get(name, latest), key=lambda each: each.end)

    def wait(self, name: str) -> None:
        """Wait for what an instruction waits for, if anything."""
        pending = self.pending.pop(name, None)
        if pending is not None and pending.end > self.now:
            self.run(pending.end - self.now, pending.limit)


@dataclasses.dataclass(frozen=True)
class _Walk:
    module: Module
    runs: dict[tuple[str, str], Run]
    network: Network
    chip: Chip

    def computation(self, name: str) -> tuple[float, Counter[str]]:
        """Return (seconds, seconds by limit) of one run of a computation."""
        clock, computation = _Clock(), self.module.computations[name]
        for instruction in computation.instructions.values():
            self.instruction(clock, computation, instruction)
        return clock.now, clock.spent

    def instruction(self, clock: _Clock, computation: Computation, instruction: Instruction) -> None:
        """Advance the clock by one instruction."""
        clock.wait(instruction.name)
        run = self.runs[computation.name, instruction.name]
        if instruction.opcode == "async-start":
            for name in run.instruction.calls["calls"]:
                for each in self.module.computations[name].instructions.values():
                    self.instruction(clock, self.module.computations[name], each)
            return
        if instruction.opcode in ("while", "call", "conditional"):
            self.nested(clock, run)
            return
        work = work_of(self.module, computation, instruction, on_chip=self.chip.platform == "tpu")
        transfer = find_transfer(self.module, run)
        if transfer is not None:
            self.transfer(clock, transfer)
        elif instruction.opcode in ("copy-start", "slice-start"):
            clock.begin(_waiter(computation, instruction), work_seconds(self.chip, work)[1], "hbm", ["hbm"])
        else:
            seconds = work_seconds(self.chip, work)
            clock.run(max(seconds), LIMITS[seconds.index(max(seconds))])

    def nested(self, clock: _Clock, run: Run) -> None:
        """Advance the clock by what an instruction calls; of a conditional, by the longest branch."""
        times = 1 if run.trips is None else run.trips
        calls = run.instruction.calls
        names = calls.get("body") or [name for each in calls.values() for name in each]
        inner = [self.computation(name) for name in names]
        if inner:
            _, spent = max(inner, key=lambda each: each[0])
            for limit, seconds in spent.items():
                clock.run(seconds * times, limit)

    def transfer(self, clock: _Clock, transfer: Transfer) -> None:
        """Begin a collective, and wait for it at once where it is synchronous."""
        ici, dcn = link_seconds(self.chip, link_bytes(transfer, self.network))
        limit = "ici" if ici >= dcn else "dcn"
        axes = transfer_axes(transfer, self.network)
        seconds = max(ici, dcn) + COLLECTIVE_LATENCY_S if axes else 0.0
        waiter = transfer.done.name if transfer.asynchronous else transfer.start.name
        clock.begin(waiter, seconds, limit, axes)
        if not transfer.asynchronous:
            clock.wait(waiter)


def _waiter(computation: Computation, start: Instruction) -> str:
    """Return the name of the copy-done or slice-done of a start."""
    return next(each.name for each in computation.instructions.values() if start.name in each.operands)


def estimate_step(
    module: Module,
    runs: Sequence[Run],
    collectives: Sequence[Collective],
    network: Network,
    chip: Chip,
    *,
    tokens: int,
    model_flops: float,
) -> Estimate:
    """Estimate a step's time from its schedule.

    Args:
      tokens: in a step, all devices together.
      model_flops: that a step owes the model, see `flops.model_flops`.
    """
    by_place = {(run.computation.name, run.instruction.name): run for run in runs}
    step, spent = _Walk(module, by_place, network, chip).computation(module.entry)
    num_devices = len(network.places)
    work, links = total_work(module, runs, chip), bytes_by_axis(collectives)
    compute, hbm = work_seconds(chip, work)
    # A torus has links of its own for each of its dimensions, a switch one for all.
    busiest = (sum if network.switched else max)([0.0, *links.values()])
    ici, dcn = link_seconds(chip, LinkBytes(busiest, sum(each.dcn_bytes * each.count for each in collectives)))
    return Estimate(
        compute_s=compute,
        hbm_s=hbm,
        ici_s=ici,
        dcn_s=dcn,
        step_s=step,
        binding=max(LIMITS, key=lambda limit: spent[limit]),
        tokens_per_second_per_chip=tokens / step / (num_devices / chip.devices),
        mfu=model_flops / (step * num_devices * chip.flops),
        device_flops=work.flops,
        device_hbm_bytes=work.hbm_bytes,
        link_bytes=links,
        spent={limit: spent[limit] for limit in LIMITS},
    )


def total_work(module: Module, runs: Sequence[Run], chip: Chip) -> Work:
    """Return the FLOPs and bytes of main memory of one device in a step."""
    total = Work()
    for run in runs:
        work = work_of(module, run.computation, run.instruction, on_chip=chip.platform == "tpu")
        total += Work(work.flops * run.count, work.hbm_bytes * run.count)
    return total


def bytes_by_axis(collectives: Sequence[Collective]) -> dict[str, float]:
    """Return the bytes of a step over the busiest link along each mesh axis."""
    total: Counter[str] = Counter()
    for each in collectives:
        for axis in each.axes:
            total[axis] += each.ici_bytes * each.count
    return dict(total)
