"""What a run changes about its model: every option, what does not fit, and weights from before the change."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint.reader import CheckpointReader
from jaxllm.config import ModelConfig, RopeConfig, RopeScalingConfig, dump_config, load_config
from jaxllm.spec import ChunkedNTK, DynamicNTK, LinearScaling, LogN, Rope, Yarn, spec_to_json
from jaxllm.train.computation import resolve_spec
from jaxllm.train.setup import make_setup
from jaxllm.train.spec_changes import change_spec
from jaxllm.train.weights import RunWeights

SCALINGS = {
    "{kind: none}": None,
    "{kind: linear, factor: 4}": LinearScaling(factor=4.0),
    "{kind: chunked, original_length: 64}": ChunkedNTK(train_length=64),
    "{kind: dynamic, factor: 2, original_length: 64}": DynamicNTK(factor=2.0, original_max_position=64),
    "{kind: dynamic, factor: 1, original_length: 64, cached_keys: unrotated}": DynamicNTK(
        factor=1.0, original_max_position=64, cached_keys="unrotated"
    ),
    "{kind: yarn, factor: 8, original_length: 64}": Yarn(factor=8.0, original_max_position=64),
    "{kind: yarn, factor: 8, original_length: 64, beta_fast: 16, beta_slow: 2, mscale: 0}": Yarn(
        factor=8.0, original_max_position=64, beta_fast=16.0, beta_slow=2.0, mscale=0.0
    ),
}


@pytest.fixture
def resolve(tmp_path):
    """Return the spec of a model with overrides of the section `model`."""

    def resolved(name, *overrides):
        required = ("run_dir=r", "tokenizer=t", "train.steps=1", "train.batch_size=1", "data.train=[{path: a}]")
        model = (f"model.name={name}", *(f"model.{override}" for override in overrides))
        config = load_config([], [*required, *model])
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config([tmp_path / "config.yaml"]) == config
        return resolve_spec(config)

    return resolved


@pytest.mark.parametrize("text", SCALINGS)
def test_every_scaling_can_be_set(resolve, text):
    published = jaxllm.spec("qwen-7b")
    expected = Rope(theta=published.position.theta, scaling=SCALINGS[text])
    assert resolve("qwen-7b", f"rope.scaling={text}") == dataclasses.replace(published, position=expected)


def test_base_logn_and_length_can_be_set_together_or_alone(resolve):
    published = jaxllm.spec("internlm2-7b")
    spec = resolve("internlm2-7b", "rope.theta=5e7", "logn=4096", "max_position_embeddings=200000")
    position = dataclasses.replace(published.position, theta=5e7)
    changes = {"position": position, "logn": LogN(train_length=4096), "max_position_embeddings": 200_000}
    assert spec == dataclasses.replace(published, **changes)
    assert resolve("qwen-7b", "logn=none") == dataclasses.replace(jaxllm.spec("qwen-7b"), logn=None)
    longer = resolve("chatglm2-6b", "max_position_embeddings=65536")
    assert longer.position.table_length == longer.max_position_embeddings == 65536
    assert resolve("chatglm-6b", "rope.theta=2e4").position.theta == 2e4


def test_without_options_every_published_spec_stays():
    specs = {name: jaxllm.spec(name) for sizes in jaxllm.families().values() for name in sizes}
    for name, spec in specs.items():
        rope = RopeConfig() if isinstance(spec.position, Rope) else None
        assert change_spec(spec, ModelConfig(name=name, rope=rope)) == spec


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("baichuan-13b", "rope.theta=1e5", "model.rope: model baichuan-13b has no rotary positions (Alibi)"),
        ("glm-10b", "rope.theta=1e5", "no rotary positions (LearnedBlock); expected null"),
        ("glm-10b", "max_position_embeddings=4096", "model.max_position_embeddings: model glm-10b has 1025 learned"),
        (
            "chatglm-6b",
            "rope.scaling={kind: linear, factor: 2}",
            "model.rope.scaling: model chatglm-6b has two positions",
        ),
        ("deepseek-v2", "logn=4096", "model.logn: model deepseek-v2 has latent attention"),
        (
            "llama-7b",
            "rope.scaling={kind: yarn, factor: 2, original_length: 8, mscale_all_dim: 1}",
            "model.rope.scaling.mscale_all_dim: model llama-7b has no latent attention; expected null, found 1.0",
        ),
        ("qwen-mini", "window=[8, 8]", "model.window: found 2 entries for 4 layers of qwen-mini"),
        ("qwen-mini", "rope.scaling={kind: linear}", "scaling.factor: missing; model.rope.scaling.kind 'linear' needs"),
        ("qwen-mini", "rope.scaling={kind: yarn, factor: 2}", "scaling.original_length: missing; model.rope"),
        (
            "qwen-mini",
            "rope.scaling={kind: chunked, original_length: 8, factor: 2}",
            "model.rope.scaling.factor: model.rope.scaling.kind 'chunked' has no such option; expected null, found 2.0",
        ),
        ("qwen-mini", "rope.scaling={kind: none, cached_keys: rotated}", "kind 'none' has no such option"),
        (
            "qwen-mini",
            "rope.scaling={kind: yarn, factor: 2, original_length: 8, beta_fast: 1, beta_slow: 1}",
            "model.rope.scaling.beta_slow: expected less than beta_fast (1.0), found 1.0",
        ),
        ("qwen-mini", "rope.scaling={kind: ntk}", "expected 'none' | 'linear' | 'dynamic' | 'chunked' | 'yarn'"),
        ("qwen-mini", "rope.theta=0", "model.rope.theta: expected > 0, found 0.0"),
        ("qwen-mini", "logn=1", "model.logn: expected >= 2, found 1"),
        ("qwen-mini", "logn=off", "model.logn: expected int | 'none' | null, found 'off'"),
    ],
)
def test_what_does_not_fit_is_refused(resolve, name, override, message):
    with pytest.raises(jaxllm.InputError) as error:
        resolve(name, override)
    assert message in str(error.value)


def test_the_step_trains_the_changed_model_and_saves_it(world, tmp_path):
    model = world.config(tmp_path)["model"] | {"rope": {"theta": 777.0}, "logn": 16, "window": [4, None]}
    setup = make_setup(load_config([world.write_config(tmp_path / "run", model=model)]))
    assert setup.objective.forward.spec == setup.spec
    assert (setup.spec.position.theta, setup.spec.logn, setup.spec.window) == (777.0, LogN(train_length=16), (4, None))


def test_weights_train_on_with_another_base_only_where_the_run_says_so(world, undisturbed, tmp_path):
    def setup(run, **model):
        model = world.config(tmp_path)["model"] | model
        return make_setup(load_config([world.write_config(tmp_path / run, model=model)]))

    scaling = RopeScalingConfig(kind="yarn", factor=4.0, original_length=32)
    longer = setup("longer", rope={"theta": 5e5, "scaling": dataclasses.asdict(scaling)}, max_position_embeddings=128)
    expected = CheckpointReader(undisturbed / "checkpoints").restore_params(longer.state.params, 24)
    for a, b in zip(
        jax.tree.leaves(RunWeights(longer, str(undisturbed)).model()), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    (tmp_path / "spec.json").write_text(spec_to_json(longer.spec))
    silent = setup("silent", name=str(tmp_path / "spec.json"))
    with pytest.raises(jaxllm.InputError, match=r"another model:\n  max_position_embeddings: .*\n  position"):
        RunWeights(silent, str(undisturbed)).model()
