"""InternLM2 1.8B, 7B and 20B (arXiv:2403.17297)."""

from __future__ import annotations

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, head_width, require_parts
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, DynamicNTK, Head, LinearScaling, ModelSpec, Norm, Rope


def spec_from_hf(config: Config) -> ModelSpec:
    """Read an InternLM2 config.json, of the first revision (`rotary`) or later (`rope_theta`, `rope_scaling`)."""
    read = ConfigReader(config, "internlm2")
    read.ignore(*BOOKKEEPING, "pretraining_tp")
    read.expect("hidden_act", "silu")
    hidden_size, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    bias = read.flag("bias", default=False)
    max_position = read.size("max_position_embeddings")
    spec = ModelSpec(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=read.size("num_hidden_layers"),
        max_position_embeddings=max_position,
        attention=GQA(
            num_heads=num_heads,
            num_kv_heads=read.size("num_key_value_heads", default=num_heads),
            head_dim=head_width(hidden_size, num_heads),
            qkv_bias=bias,
            out_bias=bias,
        ),
        position=_rope_from_hf(read, max_position),
        mlp=MLP(intermediate_size=read.size("intermediate_size")),
        norm=Norm(eps=read.number("rms_norm_eps")),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
    )
    read.finish()
    return spec


def _rope_from_hf(read: ConfigReader, max_position: int) -> Rope:
    rotary, scaling = read.table("rotary"), read.table("rope_scaling")
    theta = read.number("rope_theta", default=rotary.number("base", default=10_000.0))
    if rotary.number("base", default=theta) != theta:
        raise InputError("config.json (internlm2): rope_theta and rotary.base contradict each other")
    rotary.expect("type", "dynamic", "origin")
    kind = scaling.get("type", "rope_type", default=rotary.get("type", default="origin"))
    if kind not in ("linear", "dynamic", "origin"):
        raise InputError(f"config.json (internlm2): rope_scaling type {kind!r}, expected 'linear' or 'dynamic'")
    factor = scaling.number("factor", default=rotary.number("scaling_factor", default=1.0))
    if rotary.get("type", default=kind) != kind or rotary.number("scaling_factor", default=factor) != factor:
        raise InputError("config.json (internlm2): rope_scaling and rotary contradict each other")
    rotary.finish()
    scaling.finish()
    if kind == "linear":
        return Rope(theta=theta, scaling=LinearScaling(factor=factor))
    dynamic = DynamicNTK(factor=factor, original_max_position=max_position)
    return Rope(theta=theta, scaling=dynamic if kind == "dynamic" else None)


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write an InternLM2 config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "InternLM2", attention=GQA, position=Rope)
    kinds = {LinearScaling: "linear", DynamicNTK: "dynamic"}
    scaling = spec.position.scaling
    named = None if type(scaling) not in kinds else {"type": kinds[type(scaling)], "factor": scaling.factor}
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": spec.attention.qkv_bias,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "rms_norm_eps": spec.norm.eps,
        "rope_scaling": named,
        "rope_theta": spec.position.theta,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of an InternLM2 checkpoint; each kv group of wqkv holds its queries, then k, then v."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    queries = (attention.num_heads, attention.head_dim)
    keys_values = (attention.num_kv_heads, attention.head_dim)
    layer, ours = "model.layers.{}.", "layers/attention"
    return [
        Key("model.tok_embeddings.weight", ("embedding",)),
        Key(layer + "attention_norm.weight", ("layers/attention_norm/scale",)),
        *joined(
            layer + "attention.wqkv",
            [f"{ours}/{name}" for name in "qkv"],
            [queries, keys_values, keys_values],
            width,
            bias=attention.qkv_bias,
            num_groups=attention.num_kv_heads,
        ),
        *linear(layer + "attention.wo", f"{ours}/o", queries, width, bias=attention.out_bias),
        Key(layer + "ffn_norm.weight", ("layers/mlp_norm/scale",)),
        *linear(layer + "feed_forward.w1", "layers/mlp/gate", width, inner),
        *linear(layer + "feed_forward.w3", "layers/mlp/up", width, inner),
        *linear(layer + "feed_forward.w2", "layers/mlp/down", inner, width),
        Key("model.norm.weight", ("final_norm/scale",)),
        head_key(spec, "output.weight"),
    ]


def _size(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> ModelSpec:
    return ModelSpec(
        vocab_size=92_544,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=32_768,
        attention=GQA(num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads),
        position=Rope(theta=1e6),
        mlp=MLP(intermediate_size=inner),
        norm=Norm(eps=1e-5),
    )


INTERNLM2 = Family(
    name="internlm2",
    architectures=("InternLM2ForCausalLM",),
    model_types=("internlm2",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=(r"model\.layers\.\d+\.attention\.rotary_emb\.inv_freq",),
    reward_class="ForRewardModel",
    tokenizer=lambda config: "internlm2.model",
    chat=lambda config, tokens: "chatml-internlm2",
    sizes={
        "internlm2-1.8b": _size(24, 2048, 8192, 16, 8),
        "internlm2-7b": _size(32, 4096, 14_336, 32, 8),
        "internlm2-20b": _size(48, 6144, 16_384, 48, 8),
    },
)
