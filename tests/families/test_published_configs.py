"""Published config.json files, read into specs and written from them."""

import dataclasses
import json

import pytest

import jaxllm
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES, family_of_config, family_of_spec
from jaxllm.spec import GQA, MLP, ChunkedNTK, DynamicNTK, Head, LinearScaling, LogN, Norm, Rope
from tests.tiny_models import LLAMA, QWEN, WINDOWED_QWEN

SIZES = [name for family in FAMILIES for name in family.sizes]

QWEN_7B = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
QWEN_7B_CHAT_AUGUST_2023 = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "bias_dropout_fusion": True,
    "bos_token_id": 151643,
    "embd_pdrop": 0.1,
    "eos_token_id": 151643,
    "ffn_hidden_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-05,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 6144,
    "no_bias": True,
    "onnx_safe": None,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_flash_attn": "auto",
    "vocab_size": 151936,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
QWEN_72B = QWEN_7B | {
    "_name_or_path": "somewhere",
    "attn_dropout_prob": 0.1,
    "bf16": True,
    "emb_dropout_prob": 0.1,
    "hidden_size": 8192,
    "intermediate_size": 49152,
    "layer_norm_epsilon": 1e-05,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "padded_vocab_size": 152064,
    "params_dtype": "torch.bfloat16",
    "rope_theta": 1000000,
    "rotary_emb_base": 1000000.0,
    "softmax_in_fp32": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": False,
    "use_flash_attn": False,
    "use_logn_attn": False,
    "vocab_size": 152064,
}
LLAMA2_70B = {
    "_name_or_path": "meta-llama/Llama-2-70b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_7B_FIRST_CONVERSION = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
DEEPSEEK_67B = LLAMA2_70B | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "intermediate_size": 22016,
    "num_hidden_layers": 95,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}


def read(config):
    return family_of_config(config).spec_from_hf(config)


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def test_published_configs_are_the_sizes_by_name():
    assert read(LLAMA2_70B) == jaxllm.spec("llama2-70b")
    assert read(LLAMA_7B_FIRST_CONVERSION) == jaxllm.spec("llama-7b")
    assert read(QWEN_7B | {"max_position_embeddings": 32768}) == jaxllm.spec("qwen-7b")
    qwen_72b = jaxllm.spec("qwen-72b")
    assert dataclasses.replace(read(QWEN_72B), norm=qwen_72b.norm) == qwen_72b
    deepseek = read(DEEPSEEK_67B)
    assert jaxllm.count_params(deepseek) == 67_425_001_472
    assert deepseek.norm.eps == 1e-6


def test_both_qwen_dialects_say_the_same():
    renamed = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
    }
    later = {renamed.get(name, name): value for name, value in QWEN_7B_CHAT_AUGUST_2023.items()}
    spec = read(QWEN_7B_CHAT_AUGUST_2023)
    assert spec == read(without(later, "padded_vocab_size"))
    assert spec.norm == Norm(eps=1e-5)
    assert spec.mlp == MLP(intermediate_size=11008)
    assert (spec.logn, spec.position.scaling) == (LogN(train_length=2048), ChunkedNTK(train_length=2048))
    assert (spec.max_position_embeddings, spec.vocab_size) == (6144, 151936)


def test_the_padded_vocabulary_counts():
    assert read(QWEN_7B | {"vocab_size": 151851, "padded_vocab_size": 151936}).vocab_size == 151936


@pytest.mark.parametrize(
    ("change", "attribute", "expected"),
    [
        ({"num_key_value_heads": None}, "attention", GQA(num_heads=64, num_kv_heads=64, head_dim=128)),
        ({"head_dim": 64}, "attention", GQA(num_heads=64, num_kv_heads=8, head_dim=64)),
        ({"head_dim": None}, "attention", GQA(num_heads=64, num_kv_heads=8, head_dim=128)),
        (
            {"attention_bias": True},
            "attention",
            GQA(num_heads=64, num_kv_heads=8, head_dim=128, qkv_bias=True, out_bias=True),
        ),
        ({"mlp_bias": True}, "mlp", MLP(intermediate_size=28672, bias=True)),
        ({"tie_word_embeddings": True}, "head", Head(tie_word_embeddings=True)),
        ({"rms_norm_eps": 3.3e-7}, "norm", Norm(eps=3.3e-7)),
        ({"rope_theta": 500000}, "position", Rope(theta=500000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "position", Rope(scaling=LinearScaling(factor=4.0))),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}},
            "position",
            Rope(scaling=DynamicNTK(factor=2.0, original_max_position=4096)),
        ),
        (
            {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "dynamic", "factor": 2.0}},
            "position",
            Rope(theta=20000.0, scaling=DynamicNTK(factor=2.0, original_max_position=4096)),
        ),
        ({"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}, "position", Rope(theta=20000.0)),
        ({"rope_theta": 20000, "rope_parameters": {"rope_theta": 20000.0}}, "position", Rope(theta=20000.0)),
    ],
)
def test_llama_variants(change, attribute, expected):
    spec = read(LLAMA2_70B | change)
    assert getattr(spec, attribute) == expected
    assert dataclasses.replace(spec, **{attribute: getattr(read(LLAMA2_70B), attribute)}) == read(LLAMA2_70B)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA2_70B, {"quantization_config": {"bits": 4}}, r"unknown keys \['quantization_config'\]"),
        (LLAMA2_70B, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
        (LLAMA2_70B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' is not supported"),
        (LLAMA2_70B, {"rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope type 'yarn' is not supported"),
        (LLAMA2_70B, {"rope_scaling": {"type": "linear"}}, r"\(llama, rope_scaling.*missing key 'factor'"),
        (LLAMA2_70B, {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor = '4', expected a positive number"),
        (LLAMA2_70B, {"rope_scaling": "linear"}, "rope_scaling = 'linear', expected an object"),
        (LLAMA2_70B, {"rope_scaling": {"type": "linear", "factor": 4.0, "beta": 1}}, r"unknown keys \['beta'\]"),
        (LLAMA2_70B, {"rope_scaling": {"factor": 4.0}}, r"unknown keys \['factor'\]"),
        (
            LLAMA2_70B,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}},
            "original_max_position_embeddings = 2048 is not supported, expected None or 4096",
        ),
        (LLAMA2_70B, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "contradict each other"),
        (LLAMA2_70B, {"num_hidden_layers": "80"}, "num_hidden_layers = '80', expected a positive integer"),
        (LLAMA2_70B, {"num_hidden_layers": 80.0}, "num_hidden_layers = 80.0, expected a positive integer"),
        (LLAMA2_70B, {"num_attention_heads": 0}, "num_attention_heads = 0, expected a positive integer"),
        (LLAMA2_70B, {"rms_norm_eps": None}, "missing key 'rms_norm_eps'"),
        (LLAMA2_70B, {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no', expected true or false"),
        (LLAMA2_70B, {"num_key_value_heads": 7}, "num_heads 64 must be a multiple of num_kv_heads 7"),
        (QWEN_7B, {"hidden_size": None}, "missing key 'hidden_size'"),
        (QWEN_7B, {"n_embd": 2048}, "contradict each other"),
        (QWEN_72B, {"rope_theta": 10000}, "contradict each other"),
        (QWEN_7B, {"rotary_pct": 0.5}, "rotary_pct = 0.5 is not supported, expected 1.0"),
        (QWEN_7B, {"no_bias": False}, "no_bias = False is not supported"),
        (QWEN_7B, {"use_cache_quantization": True}, "use_cache_quantization = True is not supported"),
        (
            QWEN_7B,
            {"architectures": ["Qwen3ForCausalLM"]},
            r"architectures = \['Qwen3ForCausalLM'\], .*expected one of",
        ),
        (QWEN_7B, {"architectures": None, "model_type": "qwen9"}, "expected one of"),
    ],
)
def test_what_would_load_as_another_model_is_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        read(config | change)


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"internlm-104b"}))
def test_written_configs_read_back_as_the_same_spec(name):
    spec = jaxllm.spec(name)
    family = next(family for family in FAMILIES if name in family.sizes)
    config = json.loads(json.dumps(family.to_hf(spec)))
    assert family_of_config(config).spec_from_hf(config) == spec
    assert family_of_spec(spec).spec_from_hf(family_of_spec(spec).to_hf(spec)) == spec
    known = {"llama": LLAMA2_70B | LLAMA_7B_FIRST_CONVERSION | DEEPSEEK_67B, "qwen": QWEN_7B}.get(family.name, config)
    assert set(config) - set(known) <= {"head_dim", "mlp_bias", "rope_theta", "torch_dtype"}, "keys nobody publishes"


def test_a_model_that_was_never_published_has_no_published_layout():
    with pytest.raises(InputError, match=r"no published layout can express this model: llama: .*mlp"):
        family_of_spec(jaxllm.spec("internlm-104b"))


@pytest.mark.parametrize(
    "spec",
    [
        WINDOWED_QWEN,
        dataclasses.replace(LLAMA, logn=LogN(train_length=4)),
        dataclasses.replace(LLAMA, position=Rope(scaling=DynamicNTK(factor=2.0, original_max_position=4))),
        dataclasses.replace(QWEN, logn=LogN(train_length=4)),
        dataclasses.replace(QWEN, mlp=MLP(intermediate_size=40, bias=True)),
    ],
)
def test_what_no_published_config_can_say_is_refused(spec):
    with pytest.raises(InputError, match=r"no published layout can express this model: llama: .*; qwen: "):
        family_of_spec(spec)


def test_unknown_model_names_suggest_near_ones():
    with pytest.raises(InputError, match=r"unknown model 'qwen-7'; did you mean .*'qwen-7b'"):
        jaxllm.spec("qwen-7")
