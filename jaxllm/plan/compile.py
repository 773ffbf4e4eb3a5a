"""The very step that `train` runs, compiled for chips that are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxllm.config import RunConfig
from jaxllm.errors import InputError
from jaxllm.plan.topology import Topology, find_devices
from jaxllm.plan.types import CompiledStep, CompilerMemory
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.rules import replicated
from jaxllm.train.computation import Computation, make_computation
from jaxllm.types import Params


class CompilerError(InputError):
    """The compiler refuses a step for another reason than the memory of a device."""


Tick = Callable[[str, float], None]
"""Takes what is being done and the seconds since it began, several times a second."""

Note = Callable[[str], None]
"""Takes what is being done from now on."""

Result = TypeVar("Result")

_TICK_SECONDS = 0.2
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_EXHAUSTED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


def plan_computation(config: RunConfig, topology: Topology) -> Computation:
    """Lay a configuration out on a topology's devices; nothing is compiled.

    Raises:
      InputError: the compiler is missing, or configuration, model and mesh do not fit each other.
    """
    mesh = make_mesh(**config.mesh.sizes(), devices=find_devices(topology))
    return make_computation(config, mesh)


def compile_step(computation: Computation, topology: Topology, tick: Tick | None = None) -> CompiledStep:
    """Compile the training step at the largest batch size of the run.

    Left out is only what several processes tell each other through the step, an integer from each device.
    The compiler works in a thread of its own, so that an interrupt is heard; it cannot be stopped, only left behind.
    A step that is too large for the chip's memory is no error here: its `hlo` is empty, and its `memory` says what the
    compiler asked for.

    Raises:
      CompilerError: for another reason the compiler refuses it.
    """
    step, log = with_compiler(lambda note: _compile(computation, topology, note), "the step", topology, tick)
    return dataclasses.replace(step, log=log)


def with_compiler(
    work: Callable[[Note], Result], what: str, topology: Topology, tick: Tick | None
) -> tuple[Result, str]:
    """Run work(note) in a thread, and return (its result, what the compiler said meanwhile).

    Args:
      what: is compiled. tick: told what `note` was told.

    Raises:
      CompilerError: the compiler refuses it.
    """
    with _captured_stderr() as read_log, _uncached():
        compiling = _in_background(work, tick)
        error = compiling.exception()
        if refused := _of_compiler(error):
            raise CompilerError(f"{topology}: the compiler refuses {what}: {str(refused).splitlines()[0]}") from error
        return compiling.result(), read_log()


def _of_compiler(error: BaseException | None) -> BaseException | None:
    """Return an error if it is the compiler's; jax raises those about kernels from it, in a class of its own."""
    return error if isinstance(error, jax.errors.JaxRuntimeError) else error and _of_compiler(error.__cause__)


def _compile(computation: Computation, topology: Topology, note: Note) -> CompiledStep:
    mesh = computation.mesh
    batch_size = max(computation.batch_sizes.sizes())
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    # Kernels ask the default device for its kind.
    with jax.default_device(mesh.devices.flat[0]), jax.set_mesh(mesh):
        start = time.monotonic()
        note("tracing")
        batch = computation.abstract_batch(batch_size)
        traced = computation.train_step().trace(computation.state, batch, rate, None, computation.frozen)
        lowered = traced.lower(lowering_platforms=(topology.chip.platform,))
        lowered_at = time.monotonic()
        note("compiling")
        read, idle = read_and_idle(computation.frozen, traced.jaxpr)
        hlo, memory, _ = finish(lowered, (computation.state, read))
    return CompiledStep(
        config=computation.config,
        spec=computation.spec,
        mesh=mesh,
        topology=topology,
        jaxpr=traced.jaxpr,
        hlo=hlo,
        memory=dataclasses.replace(memory, arguments=memory.arguments + local_bytes(idle)),
        trace_seconds=lowered_at - start,
        compile_seconds=time.monotonic() - lowered_at,
        state=computation.state,
        tokens_per_step=batch_size * computation.config.data.seq_len,
        flops_per_token=computation.objective.flops_per_token(computation.config.data.seq_len),
        frozen=computation.frozen,
    )


def read_and_idle(frozen: Params | None, jaxpr: ClosedJaxpr) -> tuple[list, list]:
    """Divide frozen weights, the last arguments, into what the step reads, and what lies there all the same.

    jax leaves out the latter, as a reference that was asked when answers were sampled.
    """
    leaves, equations = jax.tree.leaves(frozen), jaxpr.jaxpr.eqns
    used = {variable for equation in equations for variable in equation.invars if not isinstance(variable, Literal)}
    arguments = jaxpr.jaxpr.invars[len(jaxpr.jaxpr.invars) - len(leaves) :]
    pairs = list(zip(leaves, arguments, strict=True))
    return [leaf for leaf, each in pairs if each in used], [leaf for leaf, each in pairs if each not in used]


def finish(lowered: jax.stages.Lowered, held: Any) -> tuple[str, CompilerMemory, Any]:
    """Return (the compiled module as text, its memory, the shardings of its results), or ("", memory, None).

    Args:
      held: what it is given, but for the batch.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _used_bytes(str(error))
        if used is None:
            raise
        arguments = local_bytes(held)
        return "", CompilerMemory(arguments, arguments, arguments, used - arguments), None
    memory = compiled.memory_analysis()
    found = CompilerMemory(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )
    return compiled.as_text(), found, compiled.output_shardings


def _used_bytes(message: str) -> int | None:
    """Return what the step needs, from the compiler's error; None if that is about something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = next((each for pattern in _EXHAUSTED if (each := pattern.search(message))), None)
    return found and int(float(found[1]) * _UNITS[found[2]])


def local_bytes(tree: object) -> int:
    """Return the bytes that one device holds of a tree of jax.ShapeDtypeStruct with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def _in_background(work: Callable[[Note], Result], tick: Tick | None) -> Future[Result]:
    """Run work(note) in a thread, while this one hears signals and ticks, to its end; note takes what is being done."""
    doing = ["", time.monotonic()]

    def note(what: str) -> None:
        doing[:] = what, time.monotonic()

    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(work, note)
    pool.shutdown(wait=False)
    while not wait([future], _TICK_SECONDS).done:
        if tick is not None:
            tick(doing[0], time.monotonic() - doing[1])
    return future


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Keep what compilers write to the process's stderr off the terminal; gives a function that returns it."""
    with tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)

        def read() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keep what is compiled out of jax's persistent cache: without a device nothing can be read back from there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
