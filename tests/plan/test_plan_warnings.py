"""Warnings about compiled steps that have the fault, and none about a sound one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxllm.plan.chips import CHIPS
from jaxllm.plan.flops import Flops
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.runs import list_runs
from jaxllm.plan.topology import Topology
from jaxllm.plan.types import Collective, CompiledStep, CompilerMemory, Estimate
from jaxllm.plan.warnings import find_warnings
from jaxllm.sharding.mesh import make_mesh
from jaxllm.train.computation import make_computation
from tests.plan.plan_configs import tiny_config

PROGRAM = "ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"
SOUND = Collective("all-gather", ("fsdp_x",), 4, 2**26, True, True, "jvp()/layers/mlp/up", "bf16", (64, 64), 2.0**25)
ESTIMATE = Estimate(
    1.0, 0.1, 0.1, 0.0, 1.0, "compute", 1.0, 0.5, device_flops=100, spent={"compute": 0.95, "ici": 0.05}
)
FLOPS = Flops(800)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("config"), num_layers=2)
    mesh = make_mesh()
    computation = make_computation(config, mesh)
    memory = CompilerMemory(0, 0, 0, 0)
    jaxpr = jax.jit(lambda x: x).trace(jnp.zeros(8)).jaxpr
    topology = Topology(CHIPS["v5e"], (2, 4))
    return CompiledStep(
        config, computation.spec, mesh, topology, jaxpr, PROGRAM, memory, 0.0, 0.0, computation.state, 1024, 1.0
    )


def warnings_of(step, collectives=(SOUND,), flops=FLOPS, estimate=ESTIMATE, program=PROGRAM):
    module = parse_hlo(program)
    return find_warnings(step, module, list_runs(module), list(collectives), flops, estimate)


def test_a_sound_step_has_none(step):
    assert warnings_of(step) == []


def test_full_rematerialisation_is_read_from_the_log(step):
    log = "noise\nE0000 spmd_partitioner.cc:655] [spmd] Involuntary full rematerialization. The compiler cannot go\n"
    (warning,) = warnings_of(dataclasses.replace(step, log=log * 2))
    assert "2 times" in warning
    assert "Involuntary full rematerialization. The compiler cannot go" in warning


def test_large_replicated_tensors_are_named(step):
    replicated = jax.NamedSharding(step.mesh, jax.P())
    large = jax.ShapeDtypeStruct((4096, 2048), jnp.float32, sharding=replicated)
    split = jax.ShapeDtypeStruct((4096, 2048), jnp.float32, sharding=jax.NamedSharding(step.mesh, jax.P("fsdp_x")))
    state = step.state.replace(params={**step.state.params, "embedding": large, "head": split})
    (warning,) = warnings_of(dataclasses.replace(step, state=state))
    assert warning == "params/embedding (4096, 2048) is replicated: 32.0 MiB on every device"


def test_whole_sums_of_gradients_over_fsdp(step):
    gradient = dataclasses.replace(SOUND, kind="all-reduce", where="transpose(jvp())/layers/mlp/up/dot_general")
    (warning,) = warnings_of(step, [gradient])
    assert "whole all-reduce" in warning
    assert "over fsdp_x, 4x at transpose(jvp())/layers/mlp/up/dot_general" in warning
    others = [
        dataclasses.replace(gradient, axes=("replica",)),  # replicas keep whole gradients
        dataclasses.replace(gradient, axes=("tensor",)),
        dataclasses.replace(gradient, bytes_per_device=1000),  # norms
    ]
    assert warnings_of(step, others) == []


def test_all_layers_gathered_at_once(step):
    weight = step.state.params["layers"]["mlp"]["up"]["kernel"]
    stacked = dataclasses.replace(SOUND, shape=weight.shape)
    (warning,) = warnings_of(step, [stacked])
    assert warning.startswith("all layers of layers/mlp/up/kernel are gathered at once: all-gather of bf16[2,")
    assert warnings_of(step, [dataclasses.replace(SOUND, shape=weight.shape[1:])]) == []


def test_waiting_names_what_is_waited_for_most(step):
    slow = dataclasses.replace(ESTIMATE, spent={"compute": 0.6, "ici": 0.4})
    bare = dataclasses.replace(SOUND, overlapped=False, asynchronous=False, kind="reduce-scatter", count=1)
    (warning,) = warnings_of(step, [SOUND, bare], estimate=slow)
    assert warning.startswith("40% of the step waits for collectives, most for reduce-scatter")


def test_devices_that_compute_the_same(step):
    (warning,) = warnings_of(step, flops=Flops(400))
    assert "2.00 times the FLOPs" in warning


def test_programs_that_are_compiled_again(step):
    train = dataclasses.replace(step.config.train, batch_size=16)
    changed = dataclasses.replace(step.config, eval=dataclasses.replace(step.config.eval, batch_size=8), train=train)
    (warning,) = warnings_of(dataclasses.replace(step, config=changed))
    assert warning == "eval.batch_size: 8 rows are another program than training's batches"


def test_what_could_not_be_counted_is_said(step):
    program = PROGRAM.replace("ROOT %p", "%q").replace(
        "}\n", '  ROOT %k = f32[8]{0} custom-call(%q), custom_call_target="mystery"\n}\n'
    )
    found = warnings_of(step, flops=Flops(800, unknown=frozenset({"kernel x has no cost estimate"})), program=program)
    assert found == [
        "FLOPs of the program are too low: kernel x has no cost estimate",
        "a device's FLOPs and time are too low: no cost is stated by the kernels mystery",
    ]
