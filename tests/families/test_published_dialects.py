"""config.json files of every family as they were published, revision by revision, and what readers refuse."""

import dataclasses

import pytest

import jaxllm
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES, family_of_config
from jaxllm.spec import DynamicNTK, LinearScaling, Rope

BAICHUAN_13B = {
    "_from_model_config": True,
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "gradient_checkpointing": [False],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13696,
    "model_max_length": 4096,
    "model_type": "baichuan",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 64000,
}
BAICHUAN_7B = BAICHUAN_13B | {
    "architectures": ["BaiChuanForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
del BAICHUAN_7B["model_max_length"]
INTERNLM_7B = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "internlm",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 103168,
}
INTERNLM2_7B = INTERNLM_7B | {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "vocab_size": 92544,
}
FIRST_INTERNLM2_7B = INTERNLM2_7B | {"model_type": "internlm", "rotary": {"base": 1000000, "type": "dynamic"}}
del FIRST_INTERNLM2_7B["rope_theta"], FIRST_INTERNLM2_7B["rope_scaling"]
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
GLM_10B = {
    "architectures": ["GLMModel"],
    "attention_dropout_prob": 0.1,
    "attention_scale": 1.0,
    "auto_map": {"AutoConfig": "configuration_glm.GLMConfig"},
    "block_position_encoding": True,
    "checkpoint_activations": False,
    "checkpoint_num_layers": 1,
    "embedding_dropout_prob": 0.1,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "max_sequence_length": 1024,
    "model_type": "glm",
    "num_attention_heads": 64,
    "num_layers": 48,
    "output_dropout_prob": 0.1,
    "output_predict": True,
    "parallel_output": True,
    "pool_token": "cls",
    "relative_encoding": False,
    "spell_func": "lstm",
    "spell_length": None,
    "torch_dtype": "float32",
    "transformers_version": "4.23.1",
    "vocab_size": 50304,
}
CHATGLM_6B = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}
CHATGLM_6B_WITH_IMAGE_IDS = CHATGLM_6B | {
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "mask_token_id": 150000,
    "gmask_token_id": 150001,
    "pad_token_id": 20003,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "vocab_size": 150528,
}
CHATGLM2_6B = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
GLM_4_9B_CHAT = CHATGLM2_6B | {
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "architectures": ["ChatGLMModel"],
    "classifier_dropout": None,
    "eos_token_id": [151329, 151336, 151338],
    "layernorm_epsilon": 1.5625e-07,
    "num_hidden_layers": 40,
    "num_layers": 40,
    "pad_token_id": 151329,
    "padded_vocab_size": 151552,
    "rope_ratio": 500,
    "seq_length": 131072,
    "vocab_size": 151552,
}
GLM_4_9B_CHAT_HF = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "model_type": "glm",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 151552,
}
GLM_4_TRANSFORMERS_5 = {
    name: value for name, value in GLM_4_9B_CHAT_HF.items() if name not in ("partial_rotary_factor", "rope_theta")
} | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "default"}}
DEEPSEEK_V2_TRANSFORMERS_5 = {
    name: value for name, value in DEEPSEEK_V2.items() if name not in ("rope_scaling", "rope_theta")
} | {
    "head_dim": 64,
    "mlp_bias": False,
    "output_router_logits": False,
    "qk_head_dim": 192,
    "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000},
}
GLM_130B = {
    "model_type": "glm-130b",
    "num_layers": 70,
    "hidden_size": 12288,
    "inner_hidden_size": 32768,
    "vocab_size": 150528,
    "num_attention_heads": 96,
    "max_sequence_length": 2048,
    "layernorm_order": "post",
    "tokenizer_type": "icetk-glm-130B",
}


def read(config):
    return family_of_config(config).spec_from_hf(config)


@pytest.mark.parametrize(
    ("config", "family", "name"),
    [
        (BAICHUAN_7B, "baichuan", "baichuan-7b"),
        (BAICHUAN_13B, "baichuan", "baichuan-13b"),
        (BAICHUAN_7B | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 4096, "vocab_size": 125696},
         "baichuan", "baichuan2-7b"),
        (BAICHUAN_13B | {"vocab_size": 125696, "z_loss_weight": 0}, "baichuan", "baichuan2-13b"),
        (INTERNLM_7B, "internlm", "internlm-7b"),
        (INTERNLM2_7B, "internlm2", "internlm2-7b"),
        (DEEPSEEK_V2, "deepseek_v2", "deepseek-v2"),
        (DEEPSEEK_V2_LITE, "deepseek_v2", "deepseek-v2-lite"),
        (DEEPSEEK_V2_LITE | {"n_group": None, "topk_group": None}, "deepseek_v2", "deepseek-v2-lite"),
        (DEEPSEEK_V2_TRANSFORMERS_5, "deepseek_v2", "deepseek-v2"),
        (GLM_10B, "glm", "glm-10b"),
        (GLM_130B, "glm130b", "glm-130b"),
        (CHATGLM_6B, "chatglm", "chatglm-6b"),
        (CHATGLM2_6B, "chatglm2", "chatglm2-6b"),
        (CHATGLM2_6B | {"seq_length": 8192, "vocab_size": 65024}, "chatglm2", "chatglm3-6b"),
        (GLM_4_9B_CHAT, "glm4_remote", "glm-4-9b-chat"),
        (GLM_4_9B_CHAT_HF, "glm4", "glm-4-9b-chat"),
        (GLM_4_TRANSFORMERS_5, "glm4", "glm-4-9b-chat"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_published_configs_are_the_sizes_by_name(config, family, name):
    assert family_of_config(config).name == family
    expected = jaxllm.spec(name)
    if family == "glm4_remote":  # whose code has a table of rotations, which transformers' has not
        table = dataclasses.replace(expected.position, table_length=expected.max_position_embeddings)
        expected = dataclasses.replace(expected, position=table)
    assert read(config) == expected
    for unnamed in ({**config, "architectures": None}, {**config, "architectures": []}):
        assert read(unnamed) == expected, "a config is known by its model_type too"


def test_the_first_chatglm_has_image_ids_and_is_else_the_same():
    spec = jaxllm.spec("chatglm-6b")
    assert read(CHATGLM_6B_WITH_IMAGE_IDS) == dataclasses.replace(spec, vocab_size=150528)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (FIRST_INTERNLM2_7B, DynamicNTK(factor=1.0, original_max_position=32768)),
        (INTERNLM2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         DynamicNTK(factor=2.0, original_max_position=32768)),
        (INTERNLM2_7B | {"model_type": "internlm", "rope_scaling": {"type": "linear", "factor": 2}},
         LinearScaling(factor=2.0)),
        (INTERNLM2_7B | {"rotary": {"base": 1000000, "type": "origin"}}, None),
    ],
)  # fmt: skip
def test_rotary_settings_of_the_internlm2_revisions(config, scaling):
    spec = jaxllm.spec("internlm2-7b")
    assert read(config) == dataclasses.replace(spec, position=Rope(theta=1e6, scaling=scaling))


def test_the_last_internlm_revision_rotates_cached_keys_anew():
    spec, rotary = jaxllm.spec("internlm-7b"), {"base": 10000, "type": "dynamic", "scaling_factor": 1.5}
    scaling = DynamicNTK(factor=1.5, original_max_position=2048, cached_keys="unrotated")
    assert read(INTERNLM_7B | {"rotary": rotary}) == dataclasses.replace(spec, position=Rope(scaling=scaling))
    assert read(INTERNLM_7B | {"rotary": {"base": 10000, "type": "origin"}}) == spec


def test_families_that_share_a_name_are_told_apart():
    assert family_of_config(GLM_10B).name != family_of_config(GLM_4_9B_CHAT_HF).name
    names = [family_of_config(config).name for config in (CHATGLM_6B, CHATGLM2_6B, GLM_4_9B_CHAT)]
    assert len(set(names)) == 3
    assert family_of_config({"architectures": ["LlamaForCausalLM"], "vocab_size": 102400}).name == "deepseek"
    assert family_of_config({"architectures": ["LlamaForCausalLM"], "vocab_size": 32000}).name == "llama"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (BAICHUAN_13B, {"hidden_act": "gelu"}, r"\(baichuan\): hidden_act = 'gelu' is not supported"),
        (BAICHUAN_13B, {"num_attention_heads": 40.0}, r"num_attention_heads = 40\.0, expected a positive integer"),
        (BAICHUAN_13B, {"z_loss_weight": "0"}, "z_loss_weight = '0', expected a number of at least 0"),
        (BAICHUAN_13B, {"rms_norm_eps": float("inf")}, "rms_norm_eps = inf, expected a positive number"),
        (
            BAICHUAN_13B,
            {"architectures": "BaichuanForCausalLM"},
            "architectures = 'BaichuanForCausalLM', .* not supported",
        ),
        (BAICHUAN_13B, {"architectures": 13}, "architectures = 13, .* not supported"),
        (BAICHUAN_13B, {"quantization_config": {"bits": 8}}, r"\(baichuan\): unknown keys \['quantization_config'\]"),
        (INTERNLM_7B, {"bias": "yes"}, r"\(internlm\): bias = 'yes', expected true or false"),
        (INTERNLM_7B, {"rotary": {"base": 10000, "type": "linear"}}, r"rotary\): type = 'linear' is not supported"),
        (INTERNLM_7B, {"rotary": {"type": "dynamic", "scale": 2}}, r"\(internlm, rotary\): unknown keys \['scale'\]"),
        (INTERNLM_7B, {"rope_theta": 1e6, "rotary": {"base": 1e4}}, "rope_theta and rotary.base contradict each other"),
        (INTERNLM_7B, {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported"),
        (INTERNLM2_7B, {"rotary": {"base": 10000}}, "rope_theta and rotary.base contradict each other"),
        (FIRST_INTERNLM2_7B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rotary contradict"),
        (INTERNLM2_7B, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling type 'yarn', expected"),
        (INTERNLM2_7B, {"rope_scaling": {"type": "dynamic", "factor": 0}}, "factor = 0, expected a positive number"),
        (INTERNLM2_7B, {"rope_scaling": [2.0]}, r"rope_scaling = \[2\.0\], expected an object"),
        (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported, expected 'softmax'"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported"),
        (DEEPSEEK_V2, {"rope_scaling": YARN | {"type": "linear"}}, "rope type 'linear' is not supported"),
        (DEEPSEEK_V2, {"rope_scaling": YARN | {"rope_type": "default"}}, "contradict each other"),
        (DEEPSEEK_V2, {"rope_parameters": YARN | {"factor": 2}}, "contradict each other"),
        (DEEPSEEK_V2, {"n_routed_experts": 161}, "num_experts 161 must be a multiple of num_groups 8"),
        (DEEPSEEK_V2, {"topk_group": 9}, "topk_groups 9 must be at most num_groups 8"),
        (DEEPSEEK_V2, {"n_shared_experts": "2"}, "n_shared_experts = '2', expected an integer of at least 0"),
        (DEEPSEEK_V2, {"first_k_dense_replace": -1}, "first_k_dense_replace = -1, expected an integer of at least 0"),
        (DEEPSEEK_V2, {"aux_loss_alpha": [0.1]}, r"aux_loss_alpha = \[0\.1\], expected a number of at least 0"),
        (DEEPSEEK_V2, {"rope_scaling": YARN | {"mscale": "1"}}, "mscale = '1', expected a number of at least 0"),
        (DEEPSEEK_V2, {"mlp_bias": True}, "mlp_bias = True is not supported, expected False"),
        (DEEPSEEK_V2, {"qk_head_dim": 128}, "qk_head_dim = 128 is not supported, expected None or 192"),
        (DEEPSEEK_V2, {"kv_lora_rank": None}, "missing key 'kv_lora_rank'"),
        (DEEPSEEK_V2, {"num_experts_per_tok": 161}, "num_experts_per_tok must be at most 160, found 161"),
        (GLM_10B, {"relative_encoding": True}, r"\(glm\): relative_encoding = True is not supported"),
        (GLM_10B, {"block_position_encoding": False}, "block_position_encoding = False is not supported"),
        (GLM_10B, {"hidden_size": 4095}, "hidden_size 4095 must be a multiple of num_attention_heads 64"),
        (GLM_10B, {"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        (GLM_130B, {"layernorm_order": "pre"}, r"\(glm130b\): layernorm_order = 'pre' is not supported"),
        (GLM_130B, {"num_layers": True}, "num_layers = True, expected a positive integer"),
        (CHATGLM_6B, {"position_encoding_2d": False}, r"\(chatglm\): position_encoding_2d = False is not supported"),
        (CHATGLM_6B, {"pre_seq_len": 128}, "pre_seq_len = 128 is not supported"),
        (CHATGLM_6B, {"quantization_bit": 4}, "quantization_bit = 4 is not supported, expected 0"),
        (CHATGLM_6B, {"image_length": 32, "eva_config": {}}, r"unknown keys \['eva_config', 'image_length'\]"),
        (CHATGLM2_6B, {"rmsnorm": False}, r"\(chatglm2\): rmsnorm = False is not supported"),
        (CHATGLM2_6B, {"add_bias_linear": True}, "add_bias_linear = True is not supported"),
        (CHATGLM2_6B, {"original_rope": False}, "original_rope = False is not supported"),
        (CHATGLM2_6B, {"multi_query_group_num": 3}, "num_heads 32 must be a multiple of num_kv_heads 3"),
        (GLM_4_9B_CHAT, {"num_layers": 39}, "'num_layers': 39, 'num_hidden_layers': 40} contradict each other"),
        (GLM_4_9B_CHAT_HF, {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters contradict rope_theta"),
        (GLM_4_9B_CHAT_HF, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn' is not supported"),
        (GLM_4_9B_CHAT_HF, {"hidden_act": "gelu"}, r"\(glm4\): hidden_act = 'gelu' is not supported"),
        (GLM_4_9B_CHAT_HF, {"head_dim": "128"}, "head_dim = '128', expected a positive integer"),
    ],
)
def test_what_would_load_as_another_model_is_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        read(config | change)


def test_every_family_has_a_config_here_or_beside():
    here = (BAICHUAN_7B, INTERNLM_7B, INTERNLM2_7B, DEEPSEEK_V2, GLM_10B, GLM_130B, CHATGLM_6B, CHATGLM2_6B)
    named = {family_of_config(config).name for config in (*here, GLM_4_9B_CHAT, GLM_4_9B_CHAT_HF)}
    assert {family.name for family in FAMILIES} - named <= {"llama", "qwen", "deepseek", "qwen2"}
