"""GLM-130B (arXiv:2210.02414). It has no published config.json: `jaxllm import` writes the one that is read here."""

from __future__ import annotations

import math

from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_width, require_parts
from jaxllm.families.glm import layer_norm_keys
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, DeepNorm, Head, ModelSpec, Norm, Rope


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a config of the training code's flags, as JSON."""
    read = ConfigReader(config, "glm130b")
    read.ignore(*BOOKKEEPING, "tokenizer_type")
    read.expect("layernorm_order", "post")
    read.expect("position_encoding_2d", False)
    read.expect("tie_word_embeddings", True)
    spec = _spec(
        layers=read.size("num_layers"),
        hidden=read.size("hidden_size"),
        inner=read.size("inner_hidden_size"),
        heads=read.size("num_attention_heads"),
        vocab_size=read.size("vocab_size"),
        positions=read.size("max_sequence_length"),
        eps=read.number("layernorm_epsilon", default=1e-5),
    )
    read.finish()
    return spec


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write such a config for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "GLM-130B", attention=GQA, position=Rope, residual=DeepNorm)
    return {
        "model_type": "glm-130b",
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "inner_hidden_size": spec.mlp.intermediate_size,
        "vocab_size": spec.vocab_size,
        "num_attention_heads": spec.attention.num_heads,
        "max_sequence_length": spec.max_position_embeddings,
        "layernorm_order": "post",
        "layernorm_epsilon": spec.norm.eps,
        "position_encoding_2d": False,
        "tie_word_embeddings": True,
        "tokenizer_type": "icetk-glm-130B",
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table: q, k, v per head; the gate is the second half of the first feed-forward matrix."""
    inner = (spec.mlp.intermediate_size,)
    return [
        Key("transformer.word_embeddings.weight", ("embedding",)),
        *keys_of_layers(spec),
        *joined(
            "transformer.layers.{}.mlp.dense_h_to_4h",
            ["layers/mlp/up", "layers/mlp/gate"],
            [inner, inner],
            (spec.hidden_size,),
            bias=True,
        ),
    ]


def keys_of_layers(spec: ModelSpec) -> list[Key]:
    """Return what GLM-130B and ChatGLM-6B have in common: norms, attention, and the second feed-forward matrix."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    heads = (attention.num_heads, attention.head_dim)
    layer, ours = "transformer.layers.{}.", "layers/attention"
    return [
        *joined(
            layer + "attention.query_key_value",
            [f"{ours}/{name}" for name in "qkv"],
            [heads] * 3,
            width,
            bias=True,
            num_groups=attention.num_heads,
        ),
        *linear(layer + "attention.dense", f"{ours}/o", heads, width, bias=True),
        *linear(layer + "mlp.dense_4h_to_h", "layers/mlp/down", inner, width, bias=True),
        *layer_norm_keys(layer + "input_layernorm", "layers/attention_norm"),
        *layer_norm_keys(layer + "post_attention_layernorm", "layers/mlp_norm"),
        *layer_norm_keys("transformer.final_layernorm", "final_norm"),
    ]


INV_FREQ = (r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq", r"mixins\.rotary-embedding\..*\.inv_freq")


def _spec(
    *, layers: int, hidden: int, inner: int, heads: int, vocab_size: int, positions: int, eps: float = 1e-5
) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(
            num_heads=heads, num_kv_heads=heads, head_dim=head_width(hidden, heads), qkv_bias=True, out_bias=True
        ),
        position=Rope(inv_freq_dtype="float16"),
        mlp=MLP(intermediate_size=inner, activation="gelu", bias=True),
        norm=Norm(kind="layer", eps=eps),
        residual=DeepNorm(alpha=math.sqrt(2 * layers)),
        head=Head(tie_word_embeddings=True),
        mask="prefix",
    )


GLM130B = Family(
    name="glm130b",
    architectures=(),
    model_types=("glm-130b",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    aligned_labels=True,
    ignorable=INV_FREQ,
    tokenizer=lambda config: "glm130b.model",
    sizes={"glm-130b": _spec(layers=70, hidden=12_288, inner=32_768, heads=96, vocab_size=150_528, positions=2048)},
)
