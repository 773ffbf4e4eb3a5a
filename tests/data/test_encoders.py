"""Which chat format a run's examples are written in."""

import dataclasses
import json

import pytest

from jaxllm.config.alignment import ChatConfig
from jaxllm.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from jaxllm.data.encoders import default_chat_format, make_encoder
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES
from jaxllm.families import spec as published_spec
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.train.from_weights import run_chat_format
from tests.data.chats import chat_tokenizer
from tests.tiny_models import LLAMA


def config_of(model, **chat):
    return RunConfig(
        run_dir="runs/x",
        stage="sft",
        tokenizer="tok",
        model=ModelConfig(name=model),
        data=DataConfig(),
        train=TrainConfig(steps=1, batch_size=1),
        chat=ChatConfig(**chat),
    )


def encoder_of(config, spec, tokenizer):
    return make_encoder(config, spec, tokenizer, run_chat_format(config, tokenizer))


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_format_can_be_named(name):
    assert encoder_of(config_of("llama2-7b", format=name), LLAMA, chat_tokenizer(name)).chat.name == name


@pytest.mark.parametrize(
    ("model", "vocabulary", "expected"),
    [
        ("qwen-7b", "chatml-qwen", "chatml-qwen"),
        ("llama2-7b", "llama2", "llama2"),
        ("llama2-7b", "chatml", "chatml"),
        ("baichuan2-7b", "baichuan2", "baichuan2"),
        ("baichuan-13b", "baichuan", "baichuan"),
        ("internlm2-7b", "chatml-internlm2", "chatml-internlm2"),
        ("chatglm-6b", "chatglm", "chatglm"),
        ("glm-4-9b-chat", "glm4", "glm4"),
        ("deepseek-7b", "deepseek-llm", "deepseek-llm"),
        ("deepseek-7b", "llama2", None),
        ("glm-10b", "llama2", None),
        ("specs/own.json", "chatml", "chatml"),
        ("specs/own.json", "llama2", None),
    ],
)
def test_the_default_is_that_of_the_family_or_chatml_as_far_as_the_vocabulary_goes(model, vocabulary, expected):
    assert default_chat_format(model, chat_tokenizer(vocabulary)) == expected


def test_a_published_config_tells_its_family(tmp_path):
    (qwen,) = (family for family in FAMILIES if family.name == "qwen")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(qwen.to_hf(published_spec("qwen-7b"))))
    assert default_chat_format(str(path), chat_tokenizer("chatml-qwen")) == "chatml-qwen"


def test_prefix_models_take_their_ids_from_the_vocabulary_or_their_config(tmp_path):
    tokenizer, spec = chat_tokenizer("chatglm"), published_spec("chatglm-6b")
    found = encoder_of(config_of("chatglm-6b"), spec, tokenizer).places.prefix_ids
    assert (found.gmask, found.sop) == (tokenizer.special_tokens["[gMASK]"], tokenizer.special_tokens["<sop>"])
    (chatglm,) = (family for family in FAMILIES if family.name == "chatglm")
    ids = {"mask_token_id": 130000, "gmask_token_id": 130001, "bos_token_id": 130004, "eos_token_id": 130005}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(chatglm.to_hf(spec) | ids))
    published = encoder_of(config_of(str(path)), spec, chat_tokenizer("llama2")).places.prefix_ids
    assert (published.gmask, published.sop) == (130001, 130004)
    with pytest.raises(InputError, match="tokenizer: found no mask token and <sop>, on which positions of own depend"):
        encoder_of(config_of("own"), spec, chat_tokenizer("llama2"))


@pytest.mark.parametrize(
    ("chat", "problem"),
    [
        ({"format": "vicuna"}, "chat.format: found 'vicuna', expected one of chatml-qwen"),
        ({"format": "glm4"}, "chat format glm4: the tokenizer has no special token"),
        ({"labels": "published"}, "chat.labels: found 'published', but the chat format chatml has no labels"),
    ],
)
def test_what_a_run_cannot_write_is_refused(chat, problem):
    with pytest.raises(InputError, match=problem):
        encoder_of(config_of("llama2-7b", **chat), LLAMA, chat_tokenizer("chatml"))


def test_options_reach_the_encoder():
    config = config_of("qwen-7b", labels="published", turns="last")
    encoder = encoder_of(config, LLAMA, chat_tokenizer("chatml-qwen"))
    assert encoder.options == config.chat and encoder.places.spec == LLAMA
    assert encoder.identity() != dataclasses.replace(encoder, options=ChatConfig()).identity()
