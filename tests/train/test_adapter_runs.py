"""Runs with an adapter, as a user goes on from them: export in peft's format, merged, and trained further."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxllm
from jaxllm.cli import main
from jaxllm.config import load_config
from jaxllm.config.alignment import AdapterConfig
from jaxllm.data.token_rows import batch_of
from jaxllm.language_model import LanguageModel
from jaxllm.nn.param import is_declared
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import spec_from_json
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.train.computation import make_computation
from jaxllm.train.tuning import make_tuning
from jaxllm.train.weights import RunWeights
from tests.saved_runs import save_run
from tests.tiny_models import random_params
from tests.train.runs import losses

LORA = {"rank": 4, "alpha": 8.0, "targets": ["q", "v", "down"]}
PREFIX = {"kind": "prefix", "prefix_length": 3, "prefix_hidden": 8}
SHORT = {
    "stage": "sft",
    "data__seq_len": 64,
    "data__heldout": [],
    "train__steps": 4,
    "checkpoint__every": 2,
    "eval__every": None,
    "schedule__warmup": 0,
    "schedule__total": 4,
}


class Shelf:
    """A published model, runs with an adapter beside it, and how to train on."""

    def __init__(self, world, folder):
        self.world, self.base = world, folder / "published"
        self.spec = spec_from_json((world.folder / "spec.json").read_text(), "spec.json")
        self.tokenizer = load_tokenizer(world.folder / "tokenizer")
        model = LanguageModel(self.spec, random_params(self.spec, scale=0.1), tokenizer=self.tokenizer)
        model.save_pretrained(self.base)
        self.rows = folder / "chats.jsonl"
        self.rows.write_text((json.dumps({"prompt": "the cat", "response": "sees the red house"}) + "\n") * 40)
        self.lora = self.save(folder / "lora", LORA)
        self.prefix = self.save(folder / "prefix", PREFIX)

    def tuning(self, options):
        return make_tuning(self.spec, AdapterConfig(**options))

    def trained(self, options):
        """Return what a run has trained, none of it zero."""
        draw = np.random.default_rng(0).normal
        return jax.tree.map(
            lambda leaf: draw(0, 0.2, leaf.value.shape).astype(np.float32),
            self.tuning(options).trained(),
            is_leaf=is_declared,
        )

    def save(self, path, options):
        shared = dict(tokenizer=self.tokenizer, init_from=str(self.base), adapter=AdapterConfig(**options))
        return save_run(path, self.spec, self.trained(options), **shared)

    def config(self, run, **options):
        options = SHORT | {"data__train": [{"path": str(self.rows)}], "model__weights": str(self.base)} | options
        return str(self.world.write_config(run, **options))

    def train(self, run, **options):
        return main(["train", "--config", self.config(run, **options)])


@pytest.fixture(scope="module")
def shelf(world, tmp_path_factory):
    return Shelf(world, tmp_path_factory.mktemp("shelf"))


def export(*arguments):
    return main(["export", *map(str, arguments)])


def test_an_adapter_leaves_in_pefts_format_and_comes_back(shelf, tmp_path, capsys):
    folder = tmp_path / "adapter"
    assert export(shelf.lora, folder, "--adapter", "--base-model", "org/base") == 0
    assert capsys.readouterr().out == f"{folder}: the adapter of {shelf.lora}\n"
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["r"], fields["base_model_name_or_path"]) == (4, "org/base")
    assert all(".lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    config = load_config([shelf.config(tmp_path / "run", adapter=LORA)])
    computation = make_computation(config, make_mesh())
    tuning = computation.objective.forward.tuning
    for path in (shelf.lora, f"{shelf.lora}/checkpoints", f"{shelf.lora}/checkpoints/1", folder):
        found = RunWeights(computation, str(shelf.base), start_adapter=str(path)).adapter(tuning)
        jax.tree.map(np.testing.assert_array_equal, found, shelf.trained(LORA))
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(
            lambda leaf: leaf.sharding, computation.state.params
        )


def test_a_run_that_went_on_from_an_adapter_resumes_without_it(shelf, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(shelf.lora, gone)
    adapter = LORA | {"weights": str(gone)}
    assert shelf.train(tmp_path / "whole", adapter=adapter) == 0
    assert shelf.train(tmp_path / "parts", adapter=adapter, train__steps=2) == 0
    shutil.rmtree(gone)
    assert shelf.train(tmp_path / "parts", adapter=adapter) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    trained = jaxllm.load(tmp_path / "whole").params["layers"]["attention"]["q"]["kernel"]
    start = merged(shelf)["layers"]["attention"]["q"]["kernel"]
    assert 0 < np.abs(trained - start).max() < 0.05


def merged(shelf):
    base = jaxllm.load(shelf.base).params
    return shelf.tuning(LORA).merge(jax.tree.map(jnp.asarray, shelf.trained(LORA)), base)


def test_a_whole_export_has_the_adapter_in_its_weights(shelf, tmp_path):
    assert export(shelf.lora, tmp_path / "merged") == 0
    found = jaxllm.load(tmp_path / "merged").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, merged(shelf))


def test_an_exported_run_tells_others_how_it_chats(shelf, tmp_path):
    assert export(shelf.lora, tmp_path / "merged") == 0
    names = shelf.tokenizer.special_tokens
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [names["<|endoftext|>"], names["<|im_end|>"]]
    template = (tmp_path / "merged" / "chat_template.jinja").read_text()
    assert template == CHAT_FORMATS["chatml"].jinja_template()


def test_an_adapter_stays_beside_the_weights_it_began_with(shelf, tmp_path, capsys):
    base, parts = tmp_path / "base", tmp_path / "parts"
    options = dict(model__weights=str(base), adapter=LORA)
    assert shelf.train(base, train__steps=2) == 0
    assert shelf.train(tmp_path / "whole", **options) == 0
    assert shelf.train(parts, **options, train__steps=2) == 0
    before = jaxllm.load(parts).params
    assert shelf.train(base) == 0
    jax.tree.map(np.testing.assert_array_equal, jaxllm.load(parts).params, before)
    assert shelf.train(parts, **options) == 0
    assert losses(parts) == losses(tmp_path / "whole")
    shutil.rmtree(base / "checkpoints" / "2")
    capsys.readouterr()
    assert export(parts, tmp_path / "out") == 2
    assert f"{base}: the weights that this run began with are gone" in capsys.readouterr().err
    assert shelf.train(parts, **options, train__steps=5) == 2
    assert "no checkpoint of step 2; there are 4" in capsys.readouterr().err


def test_other_weights_in_the_same_place_are_refused(shelf, tmp_path, capsys):
    base, run = tmp_path / "published", tmp_path / "run"
    shutil.copytree(shelf.base, base)
    options = dict(model__weights=str(base), adapter=LORA)
    assert shelf.train(run, **options, train__steps=2) == 0
    # The same weights again, copied later, are no others.
    shutil.rmtree(base)
    shutil.copytree(shelf.base, base)
    assert shelf.train(run, **options, train__steps=3) == 0
    (file,) = base.glob("*.safetensors")
    with open(file, "r+b") as weights:
        weights.seek(-2, 2)
        weights.write(b"??")
    assert shelf.train(run, **options) == 2
    assert "found other weights than those that this run began with" in capsys.readouterr().err
    assert losses(run)[-1][0] == 3
    assert shelf.train(tmp_path / "next", **options | {"adapter": LORA | {"weights": str(run)}}) == 2
    assert f"this adapter was trained beside other weights, those of {base}, than" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


def test_a_prefix_leaves_as_an_adapter_alone(shelf, tmp_path, capsys):
    assert export(shelf.prefix, tmp_path / "merged") == 2
    assert "a prefix cannot be merged" in capsys.readouterr().err
    assert export(shelf.prefix, tmp_path / "adapter", "--adapter") == 0
    (prompts,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert prompts.shape[0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_run_with_a_prefix_speaks_with_it(shelf, tmp_path):
    model, base = jaxllm.load(shelf.prefix), jaxllm.load(shelf.base)
    prompt, texts = [1, 5, 9, 30, 7], ["the cat sees the red house"]
    new = model.generate([prompt], max_new_tokens=2, eos_ids=())[0].tolist()
    ids = [prompt + new]
    params, adapter = shelf.tuning(PREFIX).join(shelf.trained(PREFIX), base.params)
    expected = jaxllm.apply(shelf.spec, params, batch_of(shelf.spec, ids), adapter=adapter).logits
    np.testing.assert_allclose(model.logits(ids), expected, atol=1e-5)
    assert np.abs(model.logits(ids) - base.logits(ids)).max() > 0.1
    assert np.argmax(expected[0, 4:6], axis=-1).tolist() == new
    assert model.score(texts)[0].sum_logprob != pytest.approx(base.score(texts)[0].sum_logprob, abs=1e-3)
    with pytest.raises(jaxllm.InputError, match="a prefix cannot be merged"):
        model.save_pretrained(tmp_path / "merged")


def test_of_a_ppo_run_the_policys_adapter_is_meant(shelf, tmp_path):
    params = {"policy": shelf.trained(LORA), "critic": {"score": {"kernel": jnp.ones(shelf.spec.hidden_size)}}}
    options = dict(stage="ppo", init_from=str(shelf.base), adapter=AdapterConfig(**LORA))
    save_run(tmp_path / "ppo", shelf.spec, params, **options)
    folders = {tmp_path / "ppo": tmp_path / "policy", shelf.lora: tmp_path / "same"}
    for run, folder in folders.items():
        assert export(run, folder, "--adapter") == 0
    found, same = (load_file(folder / "adapter_model.safetensors") for folder in folders.values())
    assert found.keys() == same.keys() and all(np.array_equal(found[name], same[name]) for name in same)


def test_what_cannot_be_exported_as_an_adapter(shelf, tmp_path, capsys):
    whole = save_run(tmp_path / "whole", shelf.spec, random_params(shelf.spec), tokenizer=shelf.tokenizer)
    reward = tmp_path / "rm"
    params = {"model": shelf.trained(LORA), "score": {"kernel": jnp.ones(shelf.spec.hidden_size)}}
    save_run(reward, shelf.spec, params, stage="reward", init_from=str(shelf.base), adapter=AdapterConfig(**LORA))
    cases = {
        (shelf.base,): "found a published model; expected a run with an adapter",
        (whole,): "found a run without an adapter",
        (reward,): "found a reward model",
        (shelf.lora, "--dtype", "bfloat16"): "leave out --as and --dtype",
    }
    for (source, *options), message in cases.items():
        assert export(source, tmp_path / "out", "--adapter", *options) == 2
        assert message in capsys.readouterr().err
    assert export(shelf.lora, tmp_path / "out", "--base-model", "x") == 2
    assert "it needs --adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_are_refused(shelf, tmp_path, capsys):
    wider = dataclasses.replace(shelf.spec, hidden_size=2 * shelf.spec.hidden_size)
    tuning = make_tuning(wider, AdapterConfig(**LORA))
    params = jax.tree.map(lambda leaf: np.ones(leaf.value.shape, np.float32), tuning.trained(), is_leaf=is_declared)
    save_run(tmp_path / "wider", wider, params, adapter=AdapterConfig(**LORA))
    cases = [
        (LORA | {"weights": "nothing"}, "adapter.weights: nothing: "),
        (LORA | {"weights": str(shelf.base)}, f"adapter.weights: {shelf.base}: no adapter_config.json"),
        (LORA | {"weights": str(tmp_path / "wider")}, "weights of another model:\n  hidden_size: found"),
        (LORA | {"weights": shelf.prefix}, "found one of kind 'prefix', expected 'lora' by adapter.kind"),
        (LORA | {"rank": 2, "weights": shelf.lora}, "by model, adapter.rank and adapter.layers"),
        (LORA | {"targets": ["q"], "weights": shelf.lora}, "by adapter.targets"),
        ({"kind": "partial", "targets": ["q"], "weights": shelf.lora}, "goes on from model.weights"),
    ]
    for adapter, message in cases:
        assert shelf.train(tmp_path / "run", adapter=adapter) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
