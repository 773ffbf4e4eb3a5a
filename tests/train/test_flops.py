"""What a trained token costs: multiplied parameters, and attention's two widths."""

import dataclasses

import pytest

import jaxllm
from jaxllm.config.alignment import AdapterConfig
from jaxllm.nn.model import count_active_params, count_matmul_params
from jaxllm.spec import GQA
from jaxllm.train.flops import model_flops_per_token, train_flops_per_token
from jaxllm.train.tuning import make_tuning
from jaxllm.train.tuning.cost import tuned_flops_per_token
from jaxllm.train.tuning.headless import Headless


@pytest.mark.parametrize(
    ("size", "total", "active"),
    [
        ("deepseek-v2", 235_741_434_880, 21_375_800_320),
        ("deepseek-v2-lite", 15_706_484_224, 2_661_150_208),
    ],
)
def test_a_token_uses_the_published_number_of_parameters(size, total, active):
    spec = jaxllm.spec(size)
    assert (jaxllm.count_params(spec), count_active_params(spec)) == (total, active)
    per_layer = 2 * spec.hidden_size + spec.attention.kv_lora_rank + (spec.attention.q_lora_rank or 0)
    norms = spec.num_layers * per_layer + spec.hidden_size
    assert count_matmul_params(spec) == active - spec.vocab_size * spec.hidden_size - norms


def test_a_token_of_a_dense_model_uses_all_parameters():
    spec = jaxllm.spec("qwen-1.8b")
    assert count_active_params(spec) == jaxllm.count_params(spec)


def test_latent_attention_multiplies_keys_and_values_of_their_own_widths():
    spec = jaxllm.spec("deepseek-v2")
    attention = 60 * 6 * 128 * (192 + 128) * 4096 / 2
    assert model_flops_per_token(spec, 4096) == 6 * count_matmul_params(spec) + attention


def test_shared_keys_cost_as_much_attention_as_own_ones():
    spec = jaxllm.spec("llama2-70b")
    own = dataclasses.replace(spec, attention=GQA(num_heads=64, num_kv_heads=64, head_dim=128))
    attention = [model_flops_per_token(each, 4096) - 6 * count_matmul_params(each) for each in (spec, own)]
    assert attention[0] == attention[1] == train_flops_per_token(0, 80, 64, 128, 128, 4096)


def test_frozen_weights_have_no_gradients():
    spec = jaxllm.spec("llama2-7b")
    whole, matrices = model_flops_per_token(spec, 512), count_matmul_params(spec)
    lora = AdapterConfig(kind="lora", targets=["q", "v"], rank=8, base="nf4")
    factors = 2 * 32 * 8 * (4096 + 4096)
    assert tuned_flops_per_token(make_tuning(spec, lora), 512) == whole - 2 * matrices + 6 * factors
    prefix = AdapterConfig(kind="prefix", prefix_length=16, prefix_hidden=64)
    assert tuned_flops_per_token(make_tuning(spec, prefix), 512) == whole - 2 * matrices
    partial = AdapterConfig(kind="partial", targets=["o"], layers=2)
    assert tuned_flops_per_token(make_tuning(spec, partial), 512) == whole - 2 * (matrices - 2 * 4096 * 4096)


def test_what_is_not_there_costs_nothing():
    spec, head = jaxllm.spec("llama2-7b"), 4096 * 32000
    whole = make_tuning(spec, None)
    assert tuned_flops_per_token(whole, 512) == model_flops_per_token(spec, 512)
    assert tuned_flops_per_token(Headless(whole), 512) == model_flops_per_token(spec, 512) - 6 * head
