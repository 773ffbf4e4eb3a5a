"""Tiny training steps, compiled for chips that are not here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import jaxllm
from jaxllm.errors import InputError
from jaxllm.nn.model import abstract_params, count_params
from jaxllm.plan.advice import refusal
from jaxllm.plan.compile import CompilerError, compile_step, local_bytes, plan_computation, read_and_idle
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.memory import kept_activations
from jaxllm.plan.plan import make_plan
from jaxllm.plan.report import plan_as_dict, plan_as_text, write_json
from jaxllm.plan.topology import parse_topology
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import tiny
from jaxllm.train.computation import Computation
from tests.plan.plan_configs import needs_libtpu, tiny_config

pytestmark = needs_libtpu
SLICE, ONE = parse_topology("v5e:2x2"), parse_topology("v5e:1x1")


@pytest.fixture(scope="module")
def fitting(tmp_path_factory):
    """A plan, and what was shown while it was made."""
    shown = []
    config = tiny_config(tmp_path_factory.mktemp("plan"), "data.seq_len=128", "model.remat=none")
    return make_plan(config, SLICE, lambda doing, seconds: shown.append(doing)), shown


@pytest.fixture(scope="module")
def too_large(tmp_path_factory):
    config = tiny_config(
        tmp_path_factory.mktemp("plan"), "data.seq_len=16384", "train.batch_size=64", "model.remat=none"
    )
    return make_plan(config, SLICE)


def test_the_step_of_train_is_compiled(fitting):
    plan, shown = fitting
    assert list(dict.fromkeys(shown)) == ["tracing", "compiling"]
    assert plan.step.tokens_per_step == 16 * 128
    assert plan.step.mesh.size == 4
    assert plan.fits and plan.memory.total < plan.memory.limit == SLICE.chip.hbm_bytes


def test_memory_is_split_into_its_parts(fitting):
    plan, _ = fitting
    memory, state = plan.memory, plan.step.state
    assert memory.params == local_bytes(state.params) == pytest.approx(count_params(plan.step.spec), rel=0.1)
    assert memory.optimizer == local_bytes(state.opt_state) == pytest.approx(2 * memory.params, rel=0.01)
    assert memory.gradients == memory.params
    assert memory.total == plan.step.memory.total
    assert memory.temporaries > 0 and memory.other > 0


def test_frozen_weights_that_a_step_does_not_read_lie_there_all_the_same():
    frozen = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in (("read", 3), ("idle", 5))}
    traced = jax.jit(lambda state, frozen: state + jnp.sum(frozen["read"])).trace(1.0, frozen)
    read, idle = read_and_idle(frozen, traced.jaxpr)
    assert (read, idle) == ([frozen["read"]], [frozen["idle"]])
    assert read_and_idle(None, traced.jaxpr) == ([], [])


def test_activations_are_what_the_backward_loop_over_layers_is_given():
    spec = tiny(jaxllm.spec("qwen-7b"), num_layers=3)
    params = abstract_params(spec, make_mesh(devices=jax.devices()[:2]))
    gradient = params["layers"]["mlp"]["gate"]["kernel"]
    local = ",".join(map(str, gradient.sharding.shard_shape(gradient.shape)))
    state = f"(s32[], f32[{local}]{{2,1,0}}, bf16[3,4,16,64]{{3,2,1,0}}, f32[3,4]{{1,0}}, bf16[4,16,64]{{2,1,0}})"
    loop = '%while.{} = {} while(%tuple), condition=%c, body=%b, metadata={{op_name="jit(f)/{}/Decoder/while"}}'
    lines = [loop.format(number, state, scope) for number, scope in enumerate(("jvp()", "transpose(jvp())"))]
    module = parse_hlo("HloModule m\n\nENTRY %main (p: s32[]) -> s32[] {\n  " + "\n  ".join(lines) + "\n}\n")
    assert kept_activations(module, spec, params) == 3 * 4 * 16 * 64 * 2 + 3 * 4 * 4


def test_flops_and_collectives_are_counted(fitting):
    analysis = fitting[0].analysis
    assert analysis.flops.once == pytest.approx(analysis.model_flops, rel=0.5)
    assert any(each.kind == "all-gather" and each.axes[0].startswith("fsdp") for each in analysis.collectives)
    assert analysis.estimate.step_s > 0


def test_json_holds_all_and_comes_back(fitting, tmp_path):
    plan, _ = fitting
    content = plan_as_dict(plan)
    write_json(content, tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read == json.loads(json.dumps(content))
    assert read["fits"] and read["memory"]["total"] == plan.memory.total
    assert read["versions"]["jax"] == jax.__version__ and "libtpu" in read["versions"]
    assert read["topology"] | {"chip": None} == {"name": "v5e:2x2", "slices": 1, "chips": 4, "devices": 4, "chip": None}
    assert len(read["collectives"]) == len(plan.analysis.collectives)
    assert read["config"]["model"]["name"] == plan.step.config.model.name


def test_json_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--json: .*nowhere.*No such file"):
        write_json({}, tmp_path / "nowhere" / "plan.json")


def test_text_names_the_verdict_and_the_limit(fitting):
    text = plan_as_text(fitting[0])
    assert "on v5e:2x2: 4 chips" in text
    assert "of 15.75: fits" in text
    assert f"limited by {fitting[0].analysis.estimate.binding}" in text
    assert all(line == line.rstrip() and "\t" not in line for line in text.splitlines())


def test_what_does_not_fit_is_no_error_but_told_in_bytes(too_large):
    memory = too_large.memory
    assert not too_large.fits and too_large.analysis is None
    assert memory.exceeded == memory.total - memory.limit > 2**30
    text = refusal(too_large)
    assert f"{memory.exceeded:,} too many" in text
    assert "model.remat=full (now none)" in text
    assert "train.grad_accum up to 16 (now 1)" in text
    assert "model.attention_impl=pallas" in text
    assert plan_as_dict(too_large)["estimate"] is None
    assert "does not fit" in plan_as_text(too_large)


class Refused(Computation):
    """A step whose kernel wants more on-chip memory than there is."""

    def train_step(self):
        def double(x_ref, y_ref):
            y_ref[...] = 2 * x_ref[...]

        shape = jax.ShapeDtypeStruct((8192, 8192), jnp.float32)
        kernel = pl.pallas_call(double, out_shape=shape)
        return jax.jit(lambda state, batch, rate, votes, frozen: kernel(jnp.zeros(shape.shape)))


def test_what_the_compiler_refuses_is_told_in_its_own_words(tmp_path):
    sound = plan_computation(tiny_config(tmp_path), ONE)
    refused = Refused(**{field.name: getattr(sound, field.name) for field in dataclasses.fields(sound)})
    with pytest.raises(
        CompilerError, match=r"v5e:1x1: the compiler refuses the step: RESOURCE_EXHAUSTED.*vmem"
    ) as error:
        compile_step(refused, ONE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.tensor=3"], "mesh: .* does not divide the 4 devices"),
        (["mesh.fsdp=2"], "= 2 devices, but there are 4"),
        (["mesh.tensor=4", "mesh.fsdp=1"], "kv_heads of size 2 cannot be split 4 ways"),
        (["train.batch_size=6"], "train.batch_size: 6 rows cannot be split over 4 ways"),
        (["model.name=no-such-model"], "no-such-model"),
        (["model.name=baichuan-13b", "data.packing=blank_infilling", "data.blank_infilling={}"], "in both directions"),
        (["model.name=glm-10b", "data.seq_len=2048"], "data.seq_len: found 2048, .* learned positions for 1025 tokens"),
        (["model.name=glm-10b"], "data.packing: found 'packed', but model glm-10b fills blanks"),
    ],
)
def test_what_does_not_divide_is_refused_before_compiling(tmp_path, overrides, message):
    config = tiny_config(tmp_path)
    changed = tiny_config(tmp_path, *overrides)
    assert config != changed
    with pytest.raises(InputError, match=message):
        plan_computation(changed, SLICE)


def test_slices_are_joined_by_replicas(tmp_path):
    topology = dataclasses.replace(SLICE, num_slices=2)
    mesh = plan_computation(tiny_config(tmp_path, "mesh.replica=2"), topology).mesh
    slices = [[device.slice_index for device in replica.flat] for replica in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]
