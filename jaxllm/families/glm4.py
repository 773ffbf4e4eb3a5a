"""GLM-4-9B (arXiv:2406.12793) in its two layouts, and GLM-4-0414."""

from __future__ import annotations

import dataclasses

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, head_width, require_parts
from jaxllm.families.chatglm2 import CHATGLM2, size
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, Head, ModelSpec, Norm, PreNorm, Rope, SandwichNorm


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a config.json of transformers' `glm` or `glm4` (GLM-4-0414) layout."""
    sandwich = "Glm4ForCausalLM" in (config.get("architectures") or ()) or config.get("model_type") == "glm4"
    read = ConfigReader(config, "glm4")
    read.ignore(*BOOKKEEPING)
    read.expect("hidden_act", "silu")
    read.expect("attention_dropout", 0.0)
    hidden_size, heads = read.size("hidden_size"), read.size("num_attention_heads")
    spec = ModelSpec(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=read.size("num_hidden_layers"),
        max_position_embeddings=read.size("max_position_embeddings"),
        attention=GQA(
            num_heads=heads,
            num_kv_heads=read.size("num_key_value_heads", default=heads),
            head_dim=read.size("head_dim", default=None) or head_width(hidden_size, heads),
            qkv_bias=read.flag("attention_bias", default=False),
        ),
        position=_rope_from_hf(read),
        mlp=MLP(intermediate_size=read.size("intermediate_size")),
        norm=Norm(eps=read.number("rms_norm_eps")),
        residual=SandwichNorm() if sandwich else PreNorm(),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
    )
    read.finish()
    return spec


def _rope_from_hf(read: ConfigReader) -> Rope:
    """Read the rotary settings, at the top (transformers 4) or in `rope_parameters` (5)."""
    inner = read.table("rope_parameters", "rope_scaling")
    theta = read.number("rope_theta", default=inner.number("rope_theta", default=10_000.0))
    fraction = read.number("partial_rotary_factor", default=inner.number("partial_rotary_factor", default=0.5))
    again = inner.number("rope_theta", default=theta), inner.number("partial_rotary_factor", default=fraction)
    if again != (theta, fraction):
        raise InputError("config.json (glm4): rope_parameters contradict rope_theta or partial_rotary_factor")
    inner.expect("rope_type", None, "default")
    inner.finish()
    return Rope(theta=theta, rotary_fraction=fraction, layout="interleaved")


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a config.json of transformers' `glm` layout, or of `glm4` where branches are normed twice.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "GLM-4", attention=GQA, position=Rope)
    sandwich = isinstance(spec.residual, SandwichNorm)
    return {
        "architectures": ["Glm4ForCausalLM" if sandwich else "GlmForCausalLM"],
        "model_type": "glm4" if sandwich else "glm",
        "attention_bias": spec.attention.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": spec.attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "partial_rotary_factor": spec.position.rotary_fraction,
        "rms_norm_eps": spec.norm.eps,
        "rope_theta": spec.position.theta,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of the `glm` and `glm4` layouts."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    queries = (attention.num_heads, attention.head_dim)
    keys_values = (attention.num_kv_heads, attention.head_dim)
    layer, ours, bias = "model.layers.{}.", "layers/attention", attention.qkv_bias
    rows = [
        Key("model.embed_tokens.weight", ("embedding",)),
        Key(layer + "input_layernorm.weight", ("layers/attention_norm/scale",)),
        *linear(layer + "self_attn.q_proj", f"{ours}/q", width, queries, bias=bias),
        *linear(layer + "self_attn.k_proj", f"{ours}/k", width, keys_values, bias=bias),
        *linear(layer + "self_attn.v_proj", f"{ours}/v", width, keys_values, bias=bias),
        *linear(layer + "self_attn.o_proj", f"{ours}/o", queries, width),
        Key(layer + "post_attention_layernorm.weight", ("layers/mlp_norm/scale",)),
        *joined(layer + "mlp.gate_up_proj", ["layers/mlp/gate", "layers/mlp/up"], [inner, inner], width),
        *linear(layer + "mlp.down_proj", "layers/mlp/down", inner, width),
        Key("model.norm.weight", ("final_norm/scale",)),
        head_key(spec, "lm_head.weight"),
    ]
    if isinstance(spec.residual, SandwichNorm):
        rows += [
            Key(layer + "post_self_attn_layernorm.weight", ("layers/attention_post_norm/scale",)),
            Key(layer + "post_mlp_layernorm.weight", ("layers/mlp_post_norm/scale",)),
        ]
    return rows


GLM4 = Family(
    name="glm4",
    architectures=("GlmForCausalLM", "Glm4ForCausalLM"),
    model_types=("glm", "glm4"),
    matches=lambda config: "rms_norm_eps" in config,
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tokenizer=lambda config: "glm4.tiktoken",
    chat=lambda config, tokens: "glm4",
    sizes={
        "glm-4-9b": size(40, vocab_size=151_552, positions=8192, eps=1.5625e-7),
        "glm-4-9b-chat": size(40, vocab_size=151_552, positions=131_072, eps=1.5625e-7, rope_ratio=500),
        "glm-4-9b-chat-1m": size(
            40, vocab_size=151_552, positions=1_048_576, eps=1.5625e-7, rope_ratio=10_000, kv_heads=4
        ),
        "glm-4-9b-0414": dataclasses.replace(
            size(40, vocab_size=151_552, positions=32_768, eps=1e-5), residual=SandwichNorm()
        ),
    },
)

# The same models as they were first published: ChatGLM2's layout, told by its list of end tokens.
GLM4_REMOTE: Family = dataclasses.replace(
    CHATGLM2,
    name="glm4_remote",
    matches=lambda config: "multi_query_attention" in config and isinstance(config.get("eos_token_id"), list),
    tokenizer=GLM4.tokenizer,
    chat=GLM4.chat,
    sizes={},
)
