"""ChatGLM-6B (arXiv:2406.12793, and the code published with the checkpoint)."""

from __future__ import annotations

import math

from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, head_width, require_parts
from jaxllm.families.glm130b import INV_FREQ, keys_of_layers
from jaxllm.families.keymap import Key, linear
from jaxllm.spec import GQA, MLP, DeepNorm, Head, ModelSpec, Norm, Rope2D


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a ChatGLM-6B config.json; its output matrix is tied unless it says otherwise."""
    read = ConfigReader(config, "chatglm")
    read.ignore(*BOOKKEEPING, "mask_token_id", "gmask_token_id")
    read.expect("position_encoding_2d", True)
    read.expect("pre_seq_len", None)
    read.expect("prefix_projection", False)
    read.expect("quantization_bit", 0)
    read.expect("quantization_embeddings", False)
    spec = _spec(
        layers=read.size("num_layers"),
        hidden=read.size("hidden_size"),
        inner=read.size("inner_hidden_size"),
        heads=read.size("num_attention_heads"),
        vocab_size=read.size("vocab_size"),
        positions=read.size("max_sequence_length"),
        eps=read.number("layernorm_epsilon", default=1e-5),
        tied=read.flag("tie_word_embeddings", default=True),
    )
    read.finish()
    return spec


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a ChatGLM-6B config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "ChatGLM", attention=GQA, position=Rope2D, residual=DeepNorm)
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "hidden_size": spec.hidden_size,
        "inner_hidden_size": spec.mlp.intermediate_size,
        "layernorm_epsilon": spec.norm.eps,
        "max_sequence_length": spec.max_position_embeddings,
        "num_attention_heads": spec.attention.num_heads,
        "num_layers": spec.num_layers,
        "position_encoding_2d": True,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of a ChatGLM-6B checkpoint; the output matrix is stored although it is tied."""
    inner = (spec.mlp.intermediate_size,)
    return [
        Key("transformer.word_embeddings.weight", ("embedding",)),
        *keys_of_layers(spec),
        *linear("transformer.layers.{}.mlp.dense_h_to_4h", "layers/mlp/up", (spec.hidden_size,), inner, bias=True),
        head_key(spec, "lm_head.weight"),
    ]


def _spec(
    *,
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    vocab_size: int,
    positions: int,
    eps: float = 1e-5,
    tied: bool = True,
) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(
            num_heads=heads, num_kv_heads=heads, head_dim=head_width(hidden, heads), qkv_bias=True, out_bias=True
        ),
        position=Rope2D(inv_freq_dtype="float16"),
        mlp=MLP(intermediate_size=inner, activation="gelu_tanh", gated=False, bias=True),
        norm=Norm(kind="layer", eps=eps),
        # The published code takes 28 layers here whatever the config says; every other code follows the config.
        residual=DeepNorm(alpha=math.sqrt(2 * layers)),
        head=Head(tie_word_embeddings=tied),
        mask="prefix",
    )


def _tokenizer(config: Config) -> str:
    # The first release still had the 20,000 image tokens of GLM-130B's vocabulary.
    return "glm130b.model" if config.get("vocab_size") == 150_528 else "chatglm.model"


CHATGLM = Family(
    name="chatglm",
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    model_types=("chatglm",),
    matches=lambda config: "inner_hidden_size" in config,
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=INV_FREQ,
    counts_past_prefix=False,
    tokenizer=_tokenizer,
    chat=lambda config, tokens: "chatglm",
    sizes={
        "chatglm-6b": _spec(layers=28, hidden=4096, inner=16_384, heads=32, vocab_size=130_528, positions=2048),
    },
)
