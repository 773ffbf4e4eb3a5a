"""LLaMA (arXiv:2302.13971), Llama 2 (arXiv:2307.09288) and every checkpoint in transformers' `llama` layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, head_width, require_parts
from jaxllm.families.keymap import Key, linear
from jaxllm.spec import GQA, MLP, DynamicNTK, Head, LinearScaling, ModelSpec, Norm, Rope


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a `llama` config.json."""
    read = ConfigReader(config, "llama")
    read.ignore(*BOOKKEEPING, "pretraining_tp", "torchscript")
    read.expect("hidden_act", "silu")
    read.expect("attention_dropout", 0.0)
    hidden_size, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    # The first conversions of LLaMA have max_sequence_length alone; where both are present, the other one counts.
    max_position = read.size("max_position_embeddings", default=read.size("max_sequence_length", default=2048))
    bias = read.flag("attention_bias", default=False)
    spec = ModelSpec(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=read.size("num_hidden_layers"),
        max_position_embeddings=max_position,
        attention=GQA(
            num_heads=num_heads,
            num_kv_heads=read.size("num_key_value_heads", default=num_heads),
            head_dim=read.size("head_dim", default=None) or head_width(hidden_size, num_heads),
            qkv_bias=bias,
            out_bias=bias,
        ),
        position=_rope_from_hf(read, max_position),
        mlp=MLP(intermediate_size=read.size("intermediate_size"), bias=read.flag("mlp_bias", default=False)),
        norm=Norm(eps=read.number("rms_norm_eps")),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
    )
    read.finish()
    return spec


def _rope_from_hf(read: ConfigReader, max_position: int) -> Rope:
    """Read `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5), which holds both."""
    inner = read.table("rope_scaling", "rope_parameters")
    theta = read.number("rope_theta", default=inner.number("rope_theta", default=10_000.0))
    if inner.number("rope_theta", default=theta) != theta:
        raise InputError("config.json (llama): rope_theta and rope_parameters.rope_theta contradict each other")
    kind = inner.get("rope_type", "type", default="default")
    if kind not in ("default", "linear", "dynamic"):
        raise InputError(f"config.json (llama): rope type {kind!r} is not supported, expected 'linear' or 'dynamic'")
    # transformers measures growth from max_position_embeddings, whatever this key says.
    inner.expect("original_max_position_embeddings", None, max_position)
    scaling = None
    if kind == "linear":
        scaling = LinearScaling(factor=inner.number("factor"))
    elif kind == "dynamic":
        scaling = DynamicNTK(factor=inner.number("factor"), original_max_position=max_position)
    inner.finish()
    return Rope(theta=theta, scaling=scaling)


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a `llama` config.json for a spec.

    Raises:
      InputError: the spec has features that the layout cannot say.
    """
    require_parts(spec, "llama", attention=GQA, position=Rope)
    if spec.window is not None or spec.logn is not None or spec.attention.qkv_bias != spec.attention.out_bias:
        raise InputError("a llama config cannot express windows, LogN, or biases on only some attention matrices")
    scaling = spec.position.scaling
    rope_scaling = None
    if isinstance(scaling, LinearScaling):
        rope_scaling = {"type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, DynamicNTK):
        if scaling.original_max_position != spec.max_position_embeddings:
            raise InputError(
                f"a llama config measures dynamic scaling from max_position_embeddings {spec.max_position_embeddings}, "
                f"found original_max_position {scaling.original_max_position}"
            )
        rope_scaling = {"type": "dynamic", "factor": scaling.factor}
    elif scaling is not None:
        raise InputError(f"a llama config cannot express {type(scaling).__name__}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": spec.attention.qkv_bias,
        "head_dim": spec.attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "mlp_bias": spec.mlp.bias,
        "num_attention_heads": spec.attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "rms_norm_eps": spec.norm.eps,
        "rope_scaling": rope_scaling,
        "rope_theta": spec.position.theta,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of a `llama` checkpoint; its q and k rows are already ordered for half-split rotation."""
    attention, width = spec.attention, (spec.hidden_size,)
    queries = (attention.num_heads, attention.head_dim)
    keys_values = (attention.num_kv_heads, attention.head_dim)
    block, ours, bias = "model.layers.{}.self_attn", "layers/attention", attention.qkv_bias
    return [
        *linear(f"{block}.q_proj", f"{ours}/q", width, queries, bias=bias),
        *linear(f"{block}.k_proj", f"{ours}/k", width, keys_values, bias=bias),
        *linear(f"{block}.v_proj", f"{ours}/v", width, keys_values, bias=bias),
        *linear(f"{block}.o_proj", f"{ours}/o", queries, width, bias=attention.out_bias),
        *keys_around_attention(spec),
    ]


def keys_around_attention(spec: ModelSpec) -> list[Key]:
    """Return the table of a `llama` checkpoint without the attention matrices, which some families pack otherwise."""
    width, inner = (spec.hidden_size,), (spec.mlp.intermediate_size,)
    layer, bias = "model.layers.{}.", spec.mlp.bias
    rows = [
        Key("model.embed_tokens.weight", ("embedding",)),
        Key(layer + "input_layernorm.weight", ("layers/attention_norm/scale",)),
        Key(layer + "post_attention_layernorm.weight", ("layers/mlp_norm/scale",)),
        *linear(layer + "mlp.up_proj", "layers/mlp/up", width, inner, bias=bias),
        *linear(layer + "mlp.down_proj", "layers/mlp/down", inner, width, bias=bias),
        Key("model.norm.weight", ("final_norm/scale",)),
        head_key(spec, "lm_head.weight"),
    ]
    gate = linear(layer + "mlp.gate_proj", "layers/mlp/gate", width, inner, bias=bias)
    return rows + gate if spec.mlp.gated else rows


def _size(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int | None = None, *, positions: int, eps: float
) -> ModelSpec:
    return ModelSpec(
        vocab_size=32_000,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(num_heads=heads, num_kv_heads=kv_heads or heads, head_dim=hidden // heads),
        position=Rope(),
        mlp=MLP(intermediate_size=inner),
        norm=Norm(eps=eps),
    )


INV_FREQ = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Rotary tables that older files hold; the config gives the same numbers."""


def _chat(config: Config, tokens: Collection[str]) -> str:
    """Tell the chat models of others that use this layout by their vocabulary."""
    if "<|im_start|>" in tokens:
        return "chatml-smollm2" if "<reponame>" in tokens else "chatml"
    return "llama2"


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=INV_FREQ,
    tokenizer=lambda config: "llama.model",
    chat=_chat,
    sizes={
        "llama-7b": _size(32, 4096, 11008, 32, positions=2048, eps=1e-6),
        "llama-13b": _size(40, 5120, 13824, 40, positions=2048, eps=1e-6),
        "llama-33b": _size(60, 6656, 17920, 52, positions=2048, eps=1e-6),
        "llama-65b": _size(80, 8192, 22016, 64, positions=2048, eps=1e-5),
        "llama2-7b": _size(32, 4096, 11008, 32, positions=4096, eps=1e-5),
        "llama2-13b": _size(40, 5120, 13824, 40, positions=4096, eps=1e-5),
        "llama2-70b": _size(80, 8192, 28672, 64, 8, positions=4096, eps=1e-5),
        "smollm2-135m": dataclasses.replace(
            _size(30, 576, 1536, 9, 3, positions=8192, eps=1e-5),
            vocab_size=49_152,
            position=Rope(theta=100_000.0),
            head=Head(tie_word_embeddings=True),
        ),
    },
)
