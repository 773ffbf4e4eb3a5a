"""Steps of the other stages, and what samples answers, compiled for chips that are not here."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.nn.model import abstract_params
from jaxllm.plan.advice import refusal
from jaxllm.plan.compile import local_bytes, plan_computation
from jaxllm.plan.plan import Plan, make_plan
from jaxllm.plan.report import plan_as_dict, plan_as_text
from jaxllm.plan.rollout_report import rollouts_as_dict, rollouts_as_text
from jaxllm.plan.rollouts import compile_rollouts
from jaxllm.plan.topology import parse_topology
from jaxllm.spec import spec_to_json
from jaxllm.train.flops import model_flops_per_token
from tests.plan.plan_configs import needs_libtpu, write_config

pytestmark = [needs_libtpu, pytest.mark.slow]
SLICE = parse_topology("v5e:2x2")
WIDTH, FEED_FORWARD = 256, 512


def configured(folder, stage, *overrides, attention_impl="reference"):
    """Return the config of a stage, of a small model with heads that kernels take."""
    spec = jaxllm.spec("llama2-70b")
    spec = dataclasses.replace(
        spec,
        num_layers=2,
        hidden_size=WIDTH,
        vocab_size=1024,
        attention=dataclasses.replace(spec.attention, num_heads=4, num_kv_heads=2),
        mlp=dataclasses.replace(spec.mlp, intermediate_size=FEED_FORWARD),
    )
    path = write_config(folder)
    (folder / "tiny.json").write_text(spec_to_json(spec))
    options = [f"stage={stage}", "model.weights=nowhere", f"model.attention_impl={attention_impl}", *overrides]
    return load_config([str(path)], options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def lora(folder):
    adapter = "adapter={kind: lora, rank: 8, alpha: 16, targets: [q, k, v, o, gate, up, down], base: nf4}"
    return make_plan(configured(folder, "sft", adapter), SLICE)


@pytest.fixture(scope="module")
def preference(folder):
    return make_plan(configured(folder, "dpo", "data.pairs_per_row=2"), SLICE)


def rollouts_of(folder, topology, *overrides):
    given = ["rollout={prompts: 8, samples: 4, max_new_tokens: 32}", "rewards=[{kind: math}]", "train.batch_size=32"]
    config = configured(folder, "grpo", *given, *overrides, attention_impl="pallas")
    computation = plan_computation(config, topology)
    return computation, compile_rollouts(computation, topology)


def test_what_an_adapter_stands_beside_is_frozen(lora):
    memory, step = lora.memory, lora.step
    assert lora.fits and memory.frozen == local_bytes(step.frozen)
    assert memory.optimizer == pytest.approx(2 * memory.params, rel=0.01)
    codes = sum(leaf.size for leaf in jax.tree.leaves(step.frozen) if leaf.dtype == jnp.uint8)
    attention, feed_forward = WIDTH * 2 * (4 + 2) * 128, WIDTH * 3 * FEED_FORWARD
    assert codes == 2 * (attention + feed_forward) // 2  # of two layers, two in a byte
    assert "frozen" in plan_as_text(lora) and plan_as_dict(lora)["memory"]["frozen"] == memory.frozen


def test_frozen_weights_have_no_gradients(lora):
    analysis = lora.analysis
    assert analysis.flops.once == pytest.approx(analysis.model_flops, rel=0.2)
    sums = [each for each in analysis.collectives if each.kind in ("reduce-scatter", "all-reduce")]
    frozen = {WIDTH * FEED_FORWARD, 512 * WIDTH, 256 * WIDTH}
    assert sums and not [each for each in sums if each.bytes_per_device // 2 in frozen]


def test_a_live_reference_is_held_and_costs_its_forward_pass(preference):
    memory, analysis, spec = preference.memory, preference.analysis, preference.step.spec
    assert preference.fits and memory.frozen == memory.params == local_bytes(preference.step.state.params)
    alone = model_flops_per_token(spec, 64)
    assert preference.step.flops_per_token == pytest.approx(4 / 3 * alone)
    assert analysis.flops.once == pytest.approx(analysis.model_flops, rel=0.2)


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_answers_are_sampled_with_weights_gathered_once(folder, name):
    topology = parse_topology(name)
    computation, rollouts = rollouts_of(folder, topology, "mesh.tensor=2")
    spec = computation.spec
    assert rollouts.fits and rollouts.answers == 32 and rollouts.round.prompts == 8
    assert {each.kind for each in rollouts.gather.collectives} == {"all-gather"}
    assert {each.dtype for each in rollouts.gather.collectives} == {"bf16"}
    smallest = 2 * WIDTH * 256
    assert not [each for each in rollouts.decode.collectives if each.bytes_per_device >= smallest]
    cache = 2 * spec.num_layers * 32 * 64 * spec.attention.num_kv_heads * spec.attention.head_dim * 2
    assert rollouts.cache == cache // topology.num_devices
    bf16 = local_bytes(abstract_params(spec, computation.mesh, "bfloat16"))
    assert rollouts.copied == pytest.approx(2 * bf16, rel=0.05)  # whole but for the tensor axis
    assert rollouts.resident == local_bytes((computation.state, computation.frozen))
    text = "\n".join(rollouts_as_text(rollouts))
    assert "32 answers at once, of 32 tokens at most" in text and "fits" in text
    assert rollouts_as_dict(rollouts)["round_s"] == rollouts.round_s > 0


def test_without_copies_weights_are_gathered_for_every_token(folder, preference):
    _, rollouts = rollouts_of(folder, SLICE, "rollout.gather=token")
    assert rollouts.gather is None and rollouts.copied == 0
    assert [each for each in rollouts.decode.collectives if each.kind == "all-gather" and each.dtype == "bf16"]
    narrow = dataclasses.replace(rollouts, limit=rollouts.total - 2, copied=5)
    plan = Plan(preference.step, preference.memory, preference.analysis, narrow)
    assert not plan.fits
    assert "7 too many" in refusal(plan) and "rollout.gather=token saves the gathered weights, 5 bytes" in refusal(plan)
