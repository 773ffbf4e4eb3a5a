"""The programs that answer prompts, compiled for chips that are not there: what a round of sampling costs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.generate.decoding import Weights
from jaxllm.generate.gathered import differ, gathered_shapes, gathering
from jaxllm.generate.rounds import Round
from jaxllm.plan.collectives import read_collectives
from jaxllm.plan.compile import Note, Tick, finish, local_bytes, with_compiler
from jaxllm.plan.estimate import estimate_step
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.network import network_of
from jaxllm.plan.runs import list_runs
from jaxllm.plan.topology import Topology
from jaxllm.plan.types import Collective, CompilerMemory, Estimate
from jaxllm.sharding.rules import replicated
from jaxllm.train.computation import Computation
from jaxllm.train.objectives.policies import SampledObjective
from jaxllm.train.objectives.trees import part

_STOP_IDS = (1,)
"""They are data, which a tokenizer knows: nothing that is compiled depends on them."""


@dataclasses.dataclass(frozen=True)
class SamplingProgram:
    """One of the programs of a round.

    Attributes:
      collectives, estimate: of one run, of the decoding of one token; None where it does not fit.
    """

    memory: CompilerMemory
    seconds_to_compile: float
    collectives: list[Collective] | None = None
    estimate: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What sampling the answers of a round takes; bytes are one device's.

    Attributes:
      round: its passes, over all devices. max_new_tokens: of an answer.
      resident: what training holds meanwhile. copied: weights put together for the round.
      weights: of what the programs are given, those.
      cache: keys and values of a pass, of as many tokens as there may be.
      gather: puts weights together; None where none need be. prefill: reads prompts. decode: one token of each answer.
      limit: bytes that may be used. chips: how many there are.
    """

    round: Round
    max_new_tokens: int
    resident: int
    copied: int
    weights: int
    cache: int
    gather: SamplingProgram | None
    prefill: SamplingProgram
    decode: SamplingProgram | None
    limit: int
    chips: int

    @property
    def total(self) -> int:
        """Bytes that a device needs."""
        programs = [each.memory.total - self.weights for each in (self.prefill, self.decode) if each is not None]
        return self.resident + self.copied + max(programs)

    @property
    def fits(self) -> bool:
        """Whether a device has so many bytes."""
        return self.exceeded == 0

    @property
    def answers(self) -> int:
        """Answers that are sampled at once."""
        return self.round.prompts * self.round.samples

    @property
    def exceeded(self) -> int:
        """Bytes that are too many; 0 where it fits."""
        return max(0, self.total - self.limit)

    @property
    def rest(self) -> int:
        """Bytes beside what training holds, the weights put together and the cache."""
        return self.total - self.resident - self.copied - self.cache

    @property
    def round_s(self) -> float | None:
        """Seconds of a round of answers of full length; None where it does not fit.

        Decoding counts a full cache at every token, so it is an upper bound.
        """
        if self.decode is None or self.decode.estimate is None:
            return None
        one_pass = self.prefill.estimate.step_s + self.max_new_tokens * self.decode.estimate.step_s
        return self.round.num_passes * one_pass + (0.0 if self.gather is None else self.gather.estimate.step_s)


def compile_rollouts(computation: Computation, topology: Topology, tick: Tick | None = None) -> Rollouts | None:
    """Compile what samples the answers of a stage; None for a stage whose batches are no answers.

    Raises:
      InputError: answers that do not fit rows, model or mesh.
      CompilerError: the compiler refuses it for another reason than the memory.
    """
    if not isinstance(computation.objective, SampledObjective):
        return None
    sampler = computation.sampler(_STOP_IDS)

    def compile_all(note: Note) -> Rollouts:
        with jax.default_device(computation.mesh.devices.flat[0]), jax.set_mesh(computation.mesh):
            return _compile(computation, topology, sampler, note)

    return with_compiler(compile_all, "the sampling of answers", topology, tick)[0]


def _compile(computation: Computation, topology: Topology, sampler: Any, note: Note) -> Rollouts:
    rollout = computation.config.rollout
    held = weights = policy_weights(computation)
    compiler = _Compiler(computation.mesh, topology, note)
    gather, moved = None, []
    if rollout.gather == "round":
        weights = gathered_shapes(computation.spec, held, computation.objective.forward.compute_dtype)
        pairs = zip(jax.tree.leaves(held), jax.tree.leaves(weights), strict=True)
        moved = [pair for pair in pairs if differ(*pair)]
    if moved:
        arrays, wanted = zip(*moved, strict=True)
        traced = gathering(tuple(each.sharding for each in arrays), wanted).trace(list(arrays))
        gather, _ = compiler.run("the gathering of weights", traced, arrays)
    plan, traced = sampler.trace_prefill(weights, rollout.prompts, rollout.samples)
    prefill, state = compiler.run("the reading of prompts", traced, weights)
    decode = None
    if state is not None:
        decode, _ = compiler.run("decoding", sampler.trace_decode(weights, state), (weights, state))
    return Rollouts(
        round=plan,
        max_new_tokens=rollout.max_new_tokens,
        resident=local_bytes((computation.state, computation.frozen)),
        copied=local_bytes([wanted for _, wanted in moved]),
        weights=local_bytes(weights),
        cache=0 if state is None else local_bytes((state.cache.k, state.cache.v)),
        gather=gather,
        prefill=prefill,
        decode=decode,
        limit=topology.chip.hbm_bytes,
        chips=topology.num_chips,
    )


@dataclasses.dataclass(frozen=True)
class _Compiler:
    mesh: Mesh
    topology: Topology
    note: Note

    def run(self, what: str, traced: jax.stages.Traced, held: Any) -> tuple[SamplingProgram, Any]:
        """Compile; return (what it costs, shapes of its results with shardings, None where it does not fit)."""
        start, chip = time.monotonic(), self.topology.chip
        self.note(f"compiling {what}")
        hlo, memory, shardings = finish(traced.lower(lowering_platforms=(chip.platform,)), held)
        seconds = time.monotonic() - start
        if not hlo:
            return SamplingProgram(memory, seconds), None
        module, network = parse_hlo(hlo), network_of(self.mesh, chip)
        runs = list_runs(module)
        collectives = read_collectives(module, runs, network)
        estimate = estimate_step(module, runs, collectives, network, chip, tokens=0, model_flops=0)
        results = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            traced.out_info,
            shardings,
        )
        return SamplingProgram(memory, seconds, collectives, estimate), results


def policy_weights(computation: Computation) -> Weights:
    """Return shapes, dtypes and shardings of what answers are sampled with."""
    objective, params, frozen = computation.objective, computation.state.params, computation.frozen
    lies = {}
    for tree in (objective.policy_params(params), part(frozen, "policy")):
        lies |= {_name(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    # What a tuning makes of several arrays, or under another name, is an adapter's.
    whole = replicated(computation.mesh)

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies.get(_name(path), whole))

    shapes = jax.eval_shape(objective.policy, params, frozen)
    return Weights(*(jax.tree_util.tree_map_with_path(placed, tree) for tree in shapes))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
