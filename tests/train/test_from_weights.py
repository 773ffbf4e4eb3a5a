"""What a run takes from its weights where the config leaves it out: model, tokenizer and chat format."""

import dataclasses
import json

import pytest
import yaml

import jaxllm
from jaxllm.checkpoint.opened import open_tokenizer
from jaxllm.cli import main
from jaxllm.config import load_config
from jaxllm.config.alignment import ChatConfig
from jaxllm.families import FAMILIES
from jaxllm.language_model import LanguageModel
from jaxllm.spec import spec_from_json, tiny
from jaxllm.tokenizers import load_tokenizer
from jaxllm.train.computation import resolve_spec
from jaxllm.train.from_weights import run_chat_format, run_tokenizer
from jaxllm.train.run_models import find_model, starting_model
from tests.saved_runs import save_run
from tests.tiny_models import random_params


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
    """Return the published folder of a tiny InternLM2, with a tokenizer.model as many families have."""
    vocabulary = pytest.importorskip("tests.tokenizers.sentencepiece_models").LLAMA
    (family,) = (family for family in FAMILIES if family.name == "internlm2")
    spec = tiny(jaxllm.spec("internlm2-7b"), vocab_size=384)
    folder = tmp_path_factory.mktemp("models") / "internlm2"
    LanguageModel(spec, random_params(spec), config=family.to_hf(spec)).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    return folder


def config_of(world, run, **options):
    """Read the config of a run that names neither model nor tokenizer."""
    fields = world.config(run, stage="sft", **options)
    del fields["tokenizer"], fields["model"]["name"]
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(fields))
    return load_config([path])


def test_a_models_config_says_whose_its_tokenizer_is(internlm2):
    special = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
    assert set(special) <= set(open_tokenizer(internlm2).special_tokens)
    assert set(load_tokenizer(internlm2).special_tokens) == {"<s>", "</s>"}


def test_a_published_folder_describes_a_run(world, internlm2, tmp_path):
    config = config_of(world, tmp_path / "run", model__weights=str(internlm2))
    tokenizer = run_tokenizer(config)
    assert tokenizer.fingerprint == open_tokenizer(internlm2).fingerprint
    assert resolve_spec(config) == find_model(internlm2).spec
    assert run_chat_format(config, tokenizer) == "chatml-internlm2"
    named = dataclasses.replace(config, tokenizer=str(internlm2), chat=ChatConfig(format="chatml"))
    assert run_tokenizer(named).fingerprint == tokenizer.fingerprint
    assert run_chat_format(named, tokenizer) == "chatml"


def test_a_run_goes_on_from_another_as_it_was(world, tmp_path, capsys):
    spec = spec_from_json((world.folder / "spec.json").read_text(), "spec.json")
    tokenizer = load_tokenizer(world.folder / "tokenizer")
    earlier = tmp_path / "earlier"
    params, chat = random_params(spec, scale=0.1), ChatConfig(format="chatml-qwen")
    save_run(earlier, spec, params, tokenizer=tokenizer, chat=chat)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "the cat", "response": "sees the dog"}) + "\n") * 8)
    run = tmp_path / "run"
    options = dict(
        data__train=[{"path": str(rows)}], data__heldout=[], data__seq_len=64, eval__every=None, train__steps=1
    )
    config_of(world, run, model__weights=str(earlier), **options)
    assert main(["train", "--config", f"{run}.yaml"]) == 0
    found = find_model(run)
    assert found.spec == spec and found.tokenizer().fingerprint == tokenizer.fingerprint
    assert found.chat_format(tokenizer) == found.meta["chat_format"] == "chatml-qwen"
    assert open_tokenizer(run).fingerprint == tokenizer.fingerprint
    earlier.rename(tmp_path / "elsewhere")
    assert main(["train", "--config", f"{run}.yaml", "train.steps=2"]) == 0
    assert find_model(run).step == 2
    assert main(["data", "check", "--config", f"{run}.yaml"]) == 0
    assert "chat format: chatml-qwen" in capsys.readouterr().out
    # A folder whose run began with other weights says nothing about these.
    other = config_of(world, run, model__weights=str(tmp_path / "elsewhere"), **options)
    assert starting_model(other).path == tmp_path / "elsewhere"


def test_weights_that_are_missing_or_hold_no_tokenizer_are_told(world, internlm2, tmp_path):
    config = config_of(world, tmp_path / "run", model__weights=str(tmp_path / "none"))
    for resolve in (resolve_spec, run_tokenizer):
        with pytest.raises(jaxllm.InputError, match=r"model.weights: .*none: not there; expected a run, a checkpoint"):
            resolve(config)
    spec = find_model(internlm2).spec
    LanguageModel(spec, random_params(spec)).save_pretrained(tmp_path / "bare")
    config = config_of(world, tmp_path / "run", model__weights=str(tmp_path / "bare"))
    with pytest.raises(jaxllm.InputError, match=r"tokenizer: missing, and none lies with model.weights .*bare"):
        run_tokenizer(config)
