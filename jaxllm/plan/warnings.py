"""What in a compiled step is likely a mistake, or costs more than it need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxllm.plan.flops import Flops
from jaxllm.plan.hlo import Module
from jaxllm.plan.runs import Run, unknown_loops
from jaxllm.plan.traffic import kernels_without_cost
from jaxllm.plan.types import Collective, CompiledStep, Estimate
from jaxllm.sharding.rules import mesh_axes
from jaxllm.train.schedule import BatchSizes

LARGE_BYTES = 16 * 2**20
"""A tensor or a collective below this is not worth a warning."""
SLOW_SHARE = 0.1
"""Waiting for collectives longer than this share of a step is worth a warning."""
REDUNDANT_SHARE = 0.1
"""So is computing this much more than the traced program asks for."""
_MOST_OF_PLACE = 200
_REMATERIALIZED = "Involuntary full rematerialization"


def find_warnings(
    step: CompiledStep,
    module: Module,
    runs: Sequence[Run],
    collectives: Sequence[Collective],
    flops: Flops,
    estimate: Estimate,
) -> list[str]:
    """List warnings about a compiled step, one line each."""
    return [
        *_full_rematerialization(step.log),
        *_replicated(step),
        *_whole_sums(collectives),
        *_stacked_gathers(step, collectives),
        *_waiting(collectives, estimate),
        *_redundant(step, flops, estimate),
        *_recompilation(step),
        *_uncounted(module, runs, flops),
    ]


def _full_rematerialization(log: str) -> Iterator[str]:
    """Tell what XLA's partitioner told."""
    lines = [line for line in log.splitlines() if _REMATERIALIZED in line]
    if lines:
        yield (
            f"the compiler replicates a tensor in full to change its sharding ({len(lines)} times): "
            f"{lines[0][lines[0].index(_REMATERIALIZED) :][:300]}"
        )


def _replicated(step: CompiledStep) -> Iterator[str]:
    """Tell of parameters, moments and frozen weights that every device holds whole."""
    if step.mesh.size == 1:
        return
    for path, leaf in _leaves(step.state, frozen=step.frozen):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= LARGE_BYTES and leaf.sharding.is_fully_replicated:
            yield f"{_name(path)} {leaf.shape} is replicated: {_mib(size)} on every device"


def _leaves(tree: Any, **more: Any) -> Iterator[tuple[tuple, jax.ShapeDtypeStruct]]:
    yield from jax.tree_util.tree_leaves_with_path(tree)
    yield from jax.tree_util.tree_leaves_with_path(more)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_fsdp(axis: str) -> bool:
    """Tell whether weights are split along a mesh axis only until they are used ("expert": all but experts' own)."""
    return axis.split("_")[0] in ("fsdp", "expert")


def _whole_sums(collectives: Sequence[Collective]) -> Iterator[str]:
    """Tell of gradients that are summed whole on every device though each keeps a part only."""
    for each in collectives:
        backward = "transpose(" in each.where or not each.where
        large = each.bytes_per_device >= LARGE_BYTES
        if each.kind == "all-reduce" and backward and large and any(map(_is_fsdp, each.axes)):
            yield f"a whole all-reduce where a reduce-scatter would move half the bytes: {_text(each)}"


def _stacked_gathers(step: CompiledStep, collectives: Sequence[Collective]) -> Iterator[str]:
    """Tell of weights of all layers that are gathered at once."""
    stacked, num_layers = {}, {group.stop - group.start for group in step.spec.layer_groups} - {1}
    for path, leaf in _leaves(step.state.params, frozen=step.frozen):
        if leaf.ndim > 2 and leaf.shape[0] in num_layers:
            stacked[leaf.shape[0], _gathered_size(leaf)] = _name(path)
    for each in collectives:
        name = stacked.get((each.shape[0], math.prod(each.shape))) if each.shape else None
        if each.kind == "all-gather" and name and each.bytes_per_device >= LARGE_BYTES:
            yield f"all layers of {name} are gathered at once: {_text(each)}"


def _gathered_size(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements that a device has of a parameter once its FSDP axes are gathered."""
    entries = [mesh_axes(entry) for entry in leaf.sharding.spec]
    kept = [name for names in entries if not any(name.startswith("fsdp") for name in names) for name in names]
    return math.prod(leaf.shape) // math.prod(leaf.sharding.mesh.shape[name] for name in kept)


def _waiting(collectives: Sequence[Collective], estimate: Estimate) -> Iterator[str]:
    waited = estimate.spent.get("ici", 0.0) + estimate.spent.get("dcn", 0.0)
    if waited > SLOW_SHARE * estimate.step_s:
        bare = [each for each in collectives if not each.overlapped]
        worst = max(bare or collectives, key=lambda each: (each.ici_bytes + each.dcn_bytes) * each.count)
        yield f"{waited / estimate.step_s:.0%} of the step waits for collectives, most for {_text(worst)}"


def _redundant(step: CompiledStep, flops: Flops, estimate: Estimate) -> Iterator[str]:
    """Tell where devices compute the same thing: their FLOPs together exceed what the program asks for."""
    done = estimate.device_flops * step.mesh.size
    if flops.total and done > (1 + REDUNDANT_SHARE) * flops.total:
        yield (
            f"the devices compute {done / flops.total:.2f} times the FLOPs of the program: some axis of the mesh "
            "splits neither rows nor features of a matrix product"
        )


def _recompilation(step: CompiledStep) -> Iterator[str]:
    sizes = sorted(set(BatchSizes(step.config).sizes()))
    if len(sizes) > 1:
        yield f"train.batch_ramp: the step is compiled {len(sizes)} times, once for each batch size {_some(sizes)}"
    if step.config.eval.batch_size not in (None, *sizes):
        yield f"eval.batch_size: {step.config.eval.batch_size} rows are another program than training's batches"


def _some(sizes: list[int]) -> str:
    shown = [str(size) for size in sizes]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])


def _uncounted(module: Module, runs: Sequence[Run], flops: Flops) -> Iterator[str]:
    for text in sorted(flops.unknown):
        yield f"FLOPs of the program are too low: {text}"
    if loops := unknown_loops(runs):
        which = f"{len(loops)} loops whose length is data count as if they ran once"
        yield f"a device's FLOPs and time are too low: {which}, as {_short(loops[0])}"
    if kernels := kernels_without_cost(module):
        yield f"a device's FLOPs and time are too low: no cost is stated by the kernels {', '.join(kernels)}"


def _axes(each: Collective) -> str:
    return " x ".join(each.axes)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _short(place: str) -> str:
    """Return a place in the program; the GPU compiler names all that it has joined."""
    return place if len(place) <= _MOST_OF_PLACE else f"{place[:_MOST_OF_PLACE]}..."


def _text(each: Collective) -> str:
    shape = ",".join(str(size) for size in each.shape)
    size, place = _mib(each.bytes_per_device), f" at {_short(each.where)}" if each.where else ""
    return f"{each.kind} of {each.dtype}[{shape}] ({size}) over {_axes(each)}, {each.count}x{place}"
