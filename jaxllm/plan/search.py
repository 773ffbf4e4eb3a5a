"""Which mesh, how many microbatches and what rematerialisation: arithmetic first, then the compiler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax

from jaxllm.config import RunConfig
from jaxllm.errors import InputError
from jaxllm.nn.decoder import REMAT_POLICIES
from jaxllm.nn.model import abstract_params
from jaxllm.plan.compile import CompilerError, Tick, local_bytes
from jaxllm.plan.plan import Plan, make_plan
from jaxllm.plan.predict import Layout, Prediction, predict
from jaxllm.plan.topology import Topology, find_devices
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import ModelSpec
from jaxllm.train.computation import make_computation, resolve_spec
from jaxllm.train.schedule import BatchSizes

_MOST_TENSOR = 64
_OPTIMISM = 0.8
"""Share of the predicted memory that a candidate is first thought to need; what is compiled corrects it."""
_TRIES = 3
"""Candidates that may be compiled for each one that is wanted, as some will not fit."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration to try, and what arithmetic expects of it."""

    config: RunConfig
    prediction: Prediction


def enumerate_candidates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """List meshes, microbatches and remat policies that divide model and batch, the fastest by arithmetic first.

    The global batch stays as configured.

    Raises:
      InputError: none divides them.
    """
    spec, devices = resolve_spec(config), find_devices(topology)
    candidates = [
        Candidate(candidate, predict(candidate, spec, topology, layout))
        for mesh in _meshes(spec, topology)
        for candidate, layout in _variants(config, spec, mesh, devices)
    ]
    if not candidates:
        raise InputError(
            f"search: no mesh of {topology.num_devices} devices divides model {config.model.label} and a batch of "
            f"{config.train.batch_size} rows; change train.batch_size or the topology"
        )
    return sorted(candidates, key=lambda each: each.prediction.step_s)


def _meshes(spec: ModelSpec, topology: Topology) -> Iterator[dict[str, int]]:
    total, slices = topology.num_devices, topology.num_slices
    for tensor in _divisors(total // slices, _MOST_TENSOR):
        for expert in _divisors(total // slices // tensor) if spec.moe else [1]:
            for replica in _divisors(total // slices // tensor // expert):
                replicas = replica * slices
                yield {
                    "replica": replicas,
                    "fsdp": total // tensor // expert // replicas,
                    "expert": expert,
                    "tensor": tensor,
                }


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [size for size in range(1, min(number, most or number) + 1) if number % size == 0]


def _variants(
    config: RunConfig, spec: ModelSpec, sizes: dict[str, int], devices: Sequence[jax.Device]
) -> Iterator[tuple[RunConfig, Layout]]:
    ways = sizes["replica"] * sizes["fsdp"] * sizes["expert"]
    rows = math.gcd(*BatchSizes(config).sizes())
    if rows % ways or (config.eval.batch_size or ways) % ways or not _divides_model(spec, sizes):
        return
    mesh = dataclasses.replace(config.mesh, **sizes)
    held = _held(dataclasses.replace(config, mesh=mesh), spec, devices)
    if held is None:
        return
    for accumulation in _divisors(rows // ways):
        train = dataclasses.replace(config.train, grad_accum=accumulation)
        for remat in REMAT_POLICIES:
            model = dataclasses.replace(config.model, remat=remat)
            layout = Layout(**sizes, microbatches=accumulation, **held)
            yield dataclasses.replace(config, mesh=mesh, train=train, model=model), layout


def _divides_model(spec: ModelSpec, sizes: dict[str, int]) -> bool:
    """Tell cheaply what most meshes fail at."""
    heads = spec.attention.num_heads % sizes["tensor"] == 0 and spec.vocab_size % sizes["tensor"] == 0
    return heads and (spec.moe is None or spec.moe.num_experts % sizes["expert"] == 0)


def _held(config: RunConfig, spec: ModelSpec, devices: Sequence[jax.Device]) -> dict[str, int] | None:
    """Return what of a Layout one device holds, None where the mesh does not divide the model."""
    try:
        mesh = make_mesh(**config.mesh.sizes(), devices=devices)
        params = local_bytes(abstract_params(spec, mesh)) // 4
        if config.stage == "pretrain":
            return {"params": params}
        single = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum=1))
        computation = make_computation(single, mesh)
    except InputError:
        return None
    state, frozen = computation.state, computation.frozen
    return {
        "params": params,
        "trained": local_bytes(state.params) // 4,
        "frozen": local_bytes((frozen, state.reference)),
    }


def search(
    config: RunConfig,
    topology: Topology,
    *,
    top: int,
    note: Callable[[str], None],
    tick: Tick | None = None,
) -> list[Plan]:
    """Compile the most promising candidates; return those that fit, the fastest by the compiled step's estimate first.

    Args:
      top: plans wanted. note: takes a line about each candidate when it is known.

    Raises:
      InputError: nothing divides model and batch, or the compiler is missing.
    """
    candidates = enumerate_candidates(config, topology)
    limit, plans, tried = topology.chip.hbm_bytes, [], 0
    actual = dict.fromkeys(REMAT_POLICIES, _OPTIMISM)
    may_fit = sum(each.prediction.memory_bytes * _OPTIMISM <= limit for each in candidates)
    note(f"{len(candidates)} candidates, {may_fit} of them may fit by arithmetic")
    if may_fit:
        note(f"compiling the fastest by arithmetic first, until {top} fit; each may take minutes")
    else:
        best = min(candidates, key=lambda each: each.prediction.memory_bytes)
        note(f"the smallest: {describe(best.config)}, about {best.prediction.memory_bytes:,} bytes of {limit:,}")
    for candidate in candidates:
        if len(plans) == top or tried == _TRIES * top:
            break
        remat, predicted = candidate.config.model.remat, candidate.prediction.memory_bytes
        if predicted * actual[remat] > limit:
            continue
        tried += 1
        try:
            plan = make_plan(candidate.config, topology, tick)
        except CompilerError as error:
            note(f"{tried}. {describe(candidate.config)}: {error}")
            continue
        note(f"{tried}. {describe(plan.step.config)}: {_verdict(plan)}")
        actual[remat] = plan.memory.total / predicted
        plans += [plan] if plan.fits else []
    return sorted(plans, key=lambda plan: plan.analysis.estimate.step_s)


def describe(config: RunConfig) -> str:
    """Return what a search varies, in a few words."""
    sizes = config.mesh.sizes()
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"
    parts = config.train.grad_accum
    return f"{mesh}, {parts} microbatch{'es' if parts > 1 else ''}, remat {config.model.remat}"


def _verdict(plan: Plan) -> str:
    if plan.analysis is None or not plan.fits:
        return f"does not fit, {plan.memory.exceeded:,} bytes too many"
    estimate = plan.analysis.estimate
    return f"{estimate.step_s:.3g} s a step, MFU {estimate.mfu:.1%}, limited by {estimate.binding}"


def config_lines(config: RunConfig) -> str:
    """Return YAML that gives another configuration the mesh, microbatches and remat of this one."""
    mesh = ", ".join(f"{axis}: {size}" for axis, size in config.mesh.sizes().items())
    return (
        f"mesh: {{{mesh}}}\ntrain: {{grad_accum: {config.train.grad_accum}}}\nmodel: {{remat: {config.model.remat}}}\n"
    )
