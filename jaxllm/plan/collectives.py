"""The collectives of a compiled step: how often, how many bytes, along which mesh axes, hidden behind what.

What compilers write, and what is counted, each collective once:
- `all-gather(...)` alone: the device waits for it.
- `all-gather-start` ... `all-gather-done`, also inside an async-start: the schedule lies between. A GPU's pair marked
  `is_sync` is waited for all the same.
- TPU: a fusion with the custom call AsyncCollectiveStart, fusions that compute and hand the transfer on, and a fusion
  with AsyncCollectiveDone; the same all-gather stands in each of them.
- TPU: a fusion all-reduce-scatter, an all-reduce of which each device keeps its part: a true reduce-scatter, though
  only the all-reduce has the name of a collective.
- TPU, between slices: `send` and `recv` to the runtime, which does what `_xla_megascale_transfer_type` says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxllm.plan.groups import axes_of, replica_groups, source_target_pairs
from jaxllm.plan.hlo import Array, Computation, Instruction, Module
from jaxllm.plan.network import LinkBytes, Network
from jaxllm.plan.runs import Run
from jaxllm.plan.traffic import work_of
from jaxllm.plan.types import Collective

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_CONTINUED = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
_LOOK_BACK = 4
_MEGASCALE = r'_xla_megascale_transfer_type="(\w+)"'
_RENDEZVOUS = r'_xla_host_transfer_rendezvous="([^"]*)"'
_CHAIN = r'chain_id="(\d+)"'


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective where it starts, and where it is waited for.

    Attributes:
      start, computation: the instruction that begins it, and where that stands.
      core: the collective itself, which may stand in a fusion or an async-start.
      done: the instruction of `computation` that waits for it; `start` itself where it is one instruction.
      arrays: the whole arrays, as one device has them: what a gather returns, what the other kinds take.
      asynchronous: the schedule goes on while it runs.
    """

    kind: str
    start: Instruction
    computation: Computation
    core: Instruction
    done: Instruction
    arrays: tuple[Array, ...]
    asynchronous: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arrays on one device."""
        return sum(array.nbytes for array in self.arrays)

    def between(self) -> list[Instruction]:
        """Return what is scheduled while it runs."""
        names = list(self.computation.instructions)
        first, last = names.index(self.start.name), names.index(self.done.name)
        return [self.computation.instructions[name] for name in names[first + 1 : last]]


def find_transfer(module: Module, run: Run) -> Transfer | None:
    """Return the collective that an instruction starts, None where it starts none."""
    core, computation = run.instruction, run.computation
    kind = core.opcode.removesuffix("-start")
    if kind in KINDS and run.within is not None:
        start, outer = run.within
        arrays = core.arrays if kind == "all-gather" else _taken(computation, core)
        return Transfer(kind, start, outer, core, _waiting(outer, start), arrays, not _is_sync(start))
    if kind in KINDS:
        done = core if kind == core.opcode else _waiting(computation, core)
        arrays = done.arrays if kind == "all-gather" else _taken(computation, core)
        return Transfer(kind, core, computation, core, done, arrays, done is not core and not _is_sync(core))
    if core.opcode == "send" and core.attribute(_MEGASCALE):
        return _slice_transfer(computation, core)
    return _fused_transfer(module, computation, core) if core.opcode == "fusion" else None


def _slice_transfer(computation: Computation, send: Instruction) -> Transfer:
    """Return the collective between slices that a send to the runtime begins."""
    rendezvous = send.attribute(_RENDEZVOUS)
    receives = [each for each in computation.instructions.values() if each.opcode == "recv"]
    receive = next(each for each in receives if each.attribute(_RENDEZVOUS) == rendezvous)
    kind = send.attribute(_MEGASCALE).lower().replace("_", "-")
    kind = "collective-permute" if kind == "one-to-one" else kind
    done = _waiting(computation, receive)
    arrays = done.arrays if kind == "all-gather" else _taken(computation, send)
    arrays = tuple(array for array in arrays if array.dtype != "token")
    return Transfer(kind, send, computation, send, done, arrays, True)


def _fused_transfer(module: Module, computation: Computation, fusion: Instruction) -> Transfer | None:
    inside = module.fused(fusion)
    core = next((each for each in inside.instructions.values() if each.opcode in KINDS), None)
    if core is None:
        return None
    if start := _custom_call(inside, _START):
        core = inside.instructions[start.operands[0]]
        done = _fused_done(module, computation, fusion, core)
        arrays = core.arrays if core.opcode == "all-gather" else _taken(inside, core)
        return Transfer(core.opcode, fusion, computation, core, done, arrays, True)
    if _CONTINUED.search(core.tail):
        return None
    # Each device keeps its part of the sum: only that part has to come to it.
    kind = "reduce-scatter" if core.opcode == "all-reduce" and inside.root.opcode == "dynamic-slice" else core.opcode
    # What the fusion takes is not yet padded.
    arrays = core.arrays if kind == "all-gather" else _taken(computation, fusion)
    return Transfer(kind, fusion, computation, core, fusion, arrays, False)


def _taken(computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
    return tuple(array for each in computation.operands(instruction) for array in each.arrays)


def _fused_done(module: Module, computation: Computation, start: Instruction, core: Instruction) -> Instruction:
    """Return the fusion that waits for an asynchronous fusion: the next one of the same chain."""
    chain = core.attribute(_CHAIN)
    names = list(computation.instructions)
    for name in names[names.index(start.name) + 1 :]:
        each = computation.instructions[name]
        inside = module.fused(each)
        if inside and _custom_call(inside, _DONE):
            chains = {one.attribute(_CHAIN) for one in inside.instructions.values() if one.opcode == core.opcode}
            if chain in chains:
                return each
    raise ValueError(f"{start.name} has no {_DONE}")


def _custom_call(computation: Computation, target: str) -> Instruction | None:
    marked = f'custom_call_target="{target}"'
    return next((each for each in computation.instructions.values() if marked in each.tail), None)


def _waiting(computation: Computation, start: Instruction) -> Instruction:
    """Return the instruction that waits for a start."""
    name = start.name
    for each in computation.instructions.values():
        if name in each.operands and each.opcode.endswith("-update"):
            name = each.name
        elif name in each.operands and each.opcode.endswith("-done"):
            return each
    raise ValueError(f"{start.opcode} {start.name} has no done")


def _is_sync(start: Instruction) -> bool:
    return '"is_sync":true' in start.tail


def read_collectives(module: Module, runs: Sequence[Run], network: Network) -> list[Collective]:
    """List the collectives of a compiled step; those alike in everything but their place in the program are one entry.

    What goes along no axis, among single devices, is left out.
    """
    found: dict[Collective, int] = {}
    for run in runs:
        transfer = find_transfer(module, run)
        if transfer is not None:
            each = _describe(module, transfer, network)
            if each.axes:
                found[each] = found.get(each, 0) + run.count
    return [dataclasses.replace(each, count=count) for each, count in found.items()]


def link_bytes(transfer: Transfer, network: Network) -> LinkBytes:
    """Return what one run of a collective moves over the busiest link."""
    groups = _groups(transfer, network)
    if transfer.kind == "collective-permute" and transfer.core.opcode != "send":
        return network.permute_bytes(transfer.nbytes, groups)
    return network.group_bytes(transfer.kind.removeprefix("ragged-"), transfer.nbytes, groups)


def transfer_axes(transfer: Transfer, network: Network) -> tuple[str, ...]:
    """Return the mesh axes along which a collective goes."""
    return axes_of(_groups(transfer, network), network.axes)


def _groups(transfer: Transfer, network: Network) -> np.ndarray:
    if transfer.core.opcode == "send":
        return network.across_slices()
    if transfer.kind == "collective-permute":
        return source_target_pairs(transfer.core)
    return replica_groups(transfer.core, network.num_partitions)


def _describe(module: Module, transfer: Transfer, network: Network) -> Collective:
    links = link_bytes(transfer, network)
    return Collective(
        kind=transfer.kind,
        axes=transfer_axes(transfer, network),
        count=0,  # the caller counts
        bytes_per_device=transfer.nbytes,
        asynchronous=transfer.asynchronous,
        overlapped=_computes(module, transfer),
        where=_where(transfer),
        dtype=transfer.arrays[0].dtype,
        shape=transfer.arrays[0].dims,
        ici_bytes=links.ici,
        dcn_bytes=links.dcn,
    )


def _computes(module: Module, transfer: Transfer) -> bool:
    """Tell whether a matrix product, a kernel or a loop runs between start and wait."""
    return any(
        each.opcode == "while" or work_of(module, transfer.computation, each, on_chip=False).flops > 0
        for each in transfer.between()
    )


def _where(transfer: Transfer) -> str:
    """Return the operation that asked for a collective; of one that the compiler invented, the one that feeds it."""
    names = [each.op_name for each in (transfer.core, transfer.done, transfer.start)]
    computation, feeding = transfer.computation, [transfer.start]
    for _ in range(_LOOK_BACK):
        feeding = [operand for each in feeding for operand in computation.operands(each)][:_LOOK_BACK]
        names += [each.op_name for each in feeding if "/" in each.op_name]
    return next((name for name in names if name), "")
