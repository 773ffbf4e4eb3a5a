"""InternLM 7B, 20B and 104B (the technical report of June 2023)."""

from __future__ import annotations

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_width, require_parts
from jaxllm.families.llama import INV_FREQ, keys
from jaxllm.spec import GQA, MLP, DynamicNTK, Head, ModelSpec, Norm, Rope


def spec_from_hf(config: Config) -> ModelSpec:
    """Read an InternLM config.json; only the last revision of the code has `rotary`."""
    read = ConfigReader(config, "internlm")
    read.ignore(*BOOKKEEPING, "pretraining_tp")
    read.expect("hidden_act", "silu")
    read.expect("rope_scaling", None)
    hidden_size, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    read.expect("num_key_value_heads", None, num_heads)
    bias = read.flag("bias", default=True)
    max_position = read.size("max_position_embeddings")
    spec = ModelSpec(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=read.size("num_hidden_layers"),
        max_position_embeddings=max_position,
        attention=GQA(
            num_heads=num_heads,
            num_kv_heads=num_heads,
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
    rotary = read.table("rotary")
    theta = read.number("rope_theta", default=rotary.number("base", default=10_000.0))
    if rotary.number("base", default=theta) != theta:
        raise InputError("config.json (internlm): rope_theta and rotary.base contradict each other")
    rotary.expect("type", "dynamic", "origin")
    factor = rotary.number("scaling_factor", default=1.0)
    dynamic = rotary.get("type", default="origin") == "dynamic"
    rotary.finish()
    scaling = DynamicNTK(factor=factor, original_max_position=max_position, cached_keys="unrotated")
    return Rope(theta=theta, scaling=scaling if dynamic else None)


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write an InternLM config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "InternLM", attention=GQA, position=Rope)
    scaling = spec.position.scaling
    rotary = {"base": spec.position.theta, "type": "origin"}
    if isinstance(scaling, DynamicNTK):
        rotary |= {"type": "dynamic", "scaling_factor": scaling.factor}
    return {
        "architectures": ["InternLMForCausalLM"],
        "model_type": "internlm",
        "bias": spec.attention.qkv_bias,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "rms_norm_eps": spec.norm.eps,
        "rotary": rotary,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def _size(
    layers: int, hidden: int, mlp: MLP, heads: int, *, vocab_size: int = 103_168, positions: int, bias: bool = False
) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, qkv_bias=bias, out_bias=bias),
        position=Rope(),
        mlp=mlp,
        norm=Norm(eps=1e-6),
    )


# The report gives layers, width, heads and vocabulary ("65.5K") of the 104B model, whose weights were never released.
# Not published: the feed-forward layer (this one, plain and four times as wide, gives 104.5e9 parameters), its
# activation, biases, positions and eps.
_INTERNLM_104B = _size(
    82,
    10_240,
    MLP(intermediate_size=40_960, activation="gelu", gated=False),
    80,
    vocab_size=65_536,
    positions=2048,
)

INTERNLM = Family(
    name="internlm",
    architectures=("InternLMForCausalLM",),
    model_types=("internlm",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=INV_FREQ,
    tokenizer=lambda config: "internlm.model",
    chat=lambda config, tokens: "internlm",
    sizes={
        "internlm-7b": _size(32, 4096, MLP(intermediate_size=11_008), 32, positions=2048, bias=True),
        "internlm-20b": _size(60, 5120, MLP(intermediate_size=13_824), 40, positions=4096),
        "internlm-104b": _INTERNLM_104B,
    },
)
