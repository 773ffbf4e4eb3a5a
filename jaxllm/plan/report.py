"""A plan as text for people and as JSON for scripts."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError
from jaxllm.files import atomic_file
from jaxllm.nn.model import count_active_params, count_params
from jaxllm.plan.memory import MemorySplit
from jaxllm.plan.plan import Plan
from jaxllm.plan.rollout_report import rollouts_as_dict, rollouts_as_text
from jaxllm.plan.types import Collective, CompiledStep, Estimate

FORMAT = 1
"""Of the JSON; grows when a reader of older files would misread it."""

_PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin")
_SHOWN_COLLECTIVES = 12
_GIB = 2**30
_MIB = 2**20


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Return everything about a plan in terms of JSON; sizes in bytes and times in seconds.

    What only a compiled step tells ("flops", "collectives", "estimate", "warnings") is null where it does not fit.
    """
    step, memory, analysis = plan.step, plan.memory, plan.analysis
    config, topology, chip = step.config, step.topology, step.topology.chip
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "model": {
            "name": config.model.label,
            "params": count_params(step.spec),
            "active_params": count_active_params(step.spec),
        },
        "topology": {
            "name": topology.name,
            "slices": topology.num_slices,
            "chips": topology.num_chips,
            "devices": topology.num_devices,
            "chip": dataclasses.asdict(chip),
        },
        "mesh": {axis: int(size) for axis, size in step.mesh.shape.items()},
        "step": {
            "rows": step.tokens_per_step // config.data.seq_len,
            "seq_len": config.data.seq_len,
            "tokens": step.tokens_per_step,
            "microbatches": config.train.grad_accum,
            "remat": config.model.remat,
        },
        "fits": plan.fits,
        "memory": dataclasses.asdict(memory) | {"total": memory.total, "exceeded": memory.exceeded},
        "seconds": {"trace": step.trace_seconds, "compile": step.compile_seconds},
        "flops": analysis
        and {
            "program": analysis.flops.total,
            "recomputed": analysis.flops.recomputed,
            "model": analysis.model_flops,
            "model_per_token": step.flops_per_token,
            "device": analysis.estimate.device_flops,
        },
        "collectives": analysis and [dataclasses.asdict(each) for each in analysis.collectives],
        "estimate": analysis and dataclasses.asdict(analysis.estimate),
        "warnings": analysis and list(analysis.warnings),
        "rollouts": plan.rollouts and rollouts_as_dict(plan.rollouts),
        "config": dataclasses.asdict(config),
    }


def installed_versions() -> dict[str, str]:
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {package: found[package] for package in _PACKAGES if package in found}


def write_json(content: Any, path: Path) -> None:
    """Write JSON so that a reader sees the old file or the whole new one.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        with atomic_file(path) as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
    except OSError as error:
        raise InputError(f"--json: {path}: {error.strerror}") from error


def plan_as_text(plan: Plan) -> str:
    """Return a plan for the terminal."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    step, analysis = plan.step, plan.analysis
    yield from _head(step)
    yield ""
    yield from _memory(plan.memory)
    if step.topology.chip.platform == "cuda":
        yield "  the limit holds for XLA_PYTHON_CLIENT_MEM_FRACTION=0.92; jax's own default is 0.75"
    if analysis is None:
        return
    yield ""
    again = f", of which rematerialised {analysis.flops.recomputed:.3e}" if analysis.flops.recomputed else ""
    yield f"FLOPs of a step: {analysis.flops.total:.3e} in the program{again}"
    parts = "6ND + causal attention" if step.frozen is None else "4 to 6 ND, and causal attention"
    yield f"  the model itself ({parts}): {analysis.model_flops:.3e}"
    device = analysis.estimate
    yield f"  one device: {device.device_flops:.3e}; it moves {device.device_hbm_bytes / _GIB:,.1f} GiB of its memory"
    yield ""
    yield from _collectives(analysis.collectives, analysis.estimate)
    yield ""
    yield from _estimate(analysis.estimate)
    if plan.rollouts is not None:
        yield ""
        yield from rollouts_as_text(plan.rollouts)
    if analysis.warnings:
        yield ""
        yield "warnings"
        yield from (f"  {warning}" for warning in analysis.warnings)


def _head(step: CompiledStep) -> Iterator[str]:
    config, topology = step.config, step.topology
    cores = f", {topology.num_devices:,} devices" if topology.num_devices != topology.num_chips else ""
    params = f"{count_params(step.spec):,} parameters"
    yield f"{config.model.label}, {params}, on {topology}: {topology.num_chips:,} chips{cores}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items() if size > 1) or "one device"
    yield f"  mesh: {mesh}"
    rows = f"{step.tokens_per_step // config.data.seq_len:,} rows x {config.data.seq_len:,}"
    parts = f" in {config.train.grad_accum} microbatches" if config.train.grad_accum > 1 else ""
    yield f"  step: {rows} = {step.tokens_per_step:,} tokens{parts}, remat {config.model.remat}"
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    yield f"  compiled in {step.compile_seconds:,.1f} s, traced in {step.trace_seconds:,.1f} s ({versions})"


def _memory(memory: MemorySplit) -> Iterator[str]:
    yield "memory of a device, GiB"
    for field in dataclasses.fields(memory):
        if field.name != "limit" and (field.name != "frozen" or memory.frozen):
            yield f"  {field.name:<14}{getattr(memory, field.name) / _GIB:>9.3f}"
    verdict = f"does not fit: {memory.exceeded:,} bytes too many"
    if memory.fits:
        verdict = f"fits, {1 - memory.total / memory.limit:.0%} free"
    yield f"  {'total':<14}{memory.total / _GIB:>9.3f} of {memory.limit / _GIB:.2f}: {verdict}"


def _collectives(collectives: Sequence[Collective], estimate: Estimate) -> Iterator[str]:
    if not collectives:
        yield "collectives: none"
        return
    alike: dict[tuple[str, ...], list[Collective]] = {}
    for each in collectives:
        alike.setdefault(_described(each), []).append(each)
    ordered = sorted(
        alike.items(), key=lambda entry: -_carried(entry[1], "ici_bytes") - _carried(entry[1], "dcn_bytes")
    )
    shown, rest = ordered[:_SHOWN_COLLECTIVES], [each for _, group in ordered[_SHOWN_COLLECTIVES:] for each in group]
    rows = [("collective", "array", "MiB", "along", "goes on", "a step", "link MiB", "network MiB")]
    rows += [(*described, *_totals(group)) for described, group in shown]
    yield "collectives of a step; link and network bytes are one device's, all runs together"
    yield from _table(rows)
    if rest:
        count, link, network = _totals(rest)
        yield f"  and {count} smaller ones: link MiB {link}, network MiB {network}"
    links = ", ".join(f"{axes} {size / _MIB:,.1f}" for axes, size in estimate.link_bytes.items() if size)
    yield f"  MiB over the busiest link by axis: {links or 'none'}"


def _described(each: Collective) -> tuple[str, ...]:
    goes_on = "hidden" if each.overlapped else "unhidden" if each.asynchronous else "waited for"
    array = f"{each.dtype}[{','.join(map(str, each.shape))}]"
    return each.kind, array, f"{each.bytes_per_device / _MIB:,.2f}", " x ".join(each.axes), goes_on


def _totals(group: Sequence[Collective]) -> tuple[str, ...]:
    """Return the texts of (how often they run, MiB over the busiest link, MiB over the network)."""
    sizes = (f"{_carried(group, field) / _MIB:,.1f}" for field in ("ici_bytes", "dcn_bytes"))
    return f"{sum(each.count for each in group):,}", *sizes


def _carried(group: Sequence[Collective], field: str) -> float:
    return sum(getattr(each, field) * each.count for each in group)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield aligned lines; columns of numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(row[column][:1].isdigit() for row in rows[1:]) for column in range(len(widths))]
    for row in rows:
        cells = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        yield "  " + "  ".join(cells).rstrip()


def _estimate(estimate: Estimate) -> Iterator[str]:
    yield f"estimated step: {estimate.step_s:.4g} s, limited by {estimate.binding}"
    each = {
        "compute": estimate.compute_s,
        "hbm": estimate.hbm_s,
        "ici": estimate.ici_s,
        "dcn": estimate.dcn_s,
    }
    yield "  each limit alone: " + ", ".join(f"{name} {seconds:.4g} s" for name, seconds in each.items())
    yield "  " + f"{estimate.tokens_per_second_per_chip:,.0f} tokens/s/chip, MFU {estimate.mfu:.1%}"
