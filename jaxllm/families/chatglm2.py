"""ChatGLM2-6B and ChatGLM3-6B (arXiv:2406.12793), in the layout of the code published with them."""

from __future__ import annotations

import dataclasses

from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, require_parts
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, Head, LinearScaling, ModelSpec, Norm, Rope

_DIVIDES_POSITIONS = "THUDM/chatglm2-6b-32k"
"""The one checkpoint whose code divides positions by `rope_ratio`; all later code multiplies the base. Nothing else in
its config tells them apart."""


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a config.json of ChatGLM2, ChatGLM3 or GLM-4 with remote code."""
    read = ConfigReader(config, "chatglm2")
    read.ignore("vocab_size")  # the tokenizer's; the tables have padded_vocab_size rows
    read.ignore(*BOOKKEEPING, "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion")
    read.ignore("attention_dropout", "hidden_dropout", "classifier_dropout", "fp32_residual_connection")
    read.expect("add_bias_linear", False)
    read.expect("apply_residual_connection_post_layernorm", False)
    read.expect("interleaved_qkv", False)
    read.expect("original_rope", True)
    read.expect("post_layer_norm", True)
    read.expect("rmsnorm", True)
    read.expect("pre_seq_len", None)
    read.expect("prefix_projection", False)
    read.expect("quantization_bit", 0)
    layers, heads = read.size("num_layers", "num_hidden_layers"), read.size("num_attention_heads")
    groups = read.size("multi_query_group_num", default=heads)
    positions = read.size("seq_length")
    spec = ModelSpec(
        vocab_size=read.size("padded_vocab_size"),
        hidden_size=read.size("hidden_size"),
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(
            num_heads=heads,
            num_kv_heads=groups if read.flag("multi_query_attention", default=True) else heads,
            head_dim=read.size("kv_channels"),
            qkv_bias=read.flag("add_qkv_bias", default=False),
        ),
        position=_rope_from_hf(read, positions, config.get("_name_or_path")),
        mlp=MLP(intermediate_size=read.size("ffn_hidden_size")),
        norm=Norm(eps=read.number("layernorm_epsilon")),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
    )
    read.finish()
    return spec


def half_rope(theta: float, table_length: int | None = None) -> Rope:
    """Return these families' rotary positions: neighbouring pairs of the first half of each head."""
    return Rope(theta=theta, rotary_fraction=0.5, layout="interleaved", table_length=table_length)


def _rope_from_hf(read: ConfigReader, positions: int, name: str | None) -> Rope:
    ratio = read.number("rope_ratio", default=1.0)
    if name == _DIVIDES_POSITIONS:
        return dataclasses.replace(half_rope(10_000.0, positions), scaling=LinearScaling(factor=ratio))
    return half_rope(10_000.0 * ratio, positions)


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write such a config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "ChatGLM2", attention=GQA, position=Rope)
    attention = spec.attention
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": attention.qkv_bias,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": spec.mlp.intermediate_size,
        "hidden_size": spec.hidden_size,
        "kv_channels": attention.head_dim,
        "layernorm_epsilon": spec.norm.eps,
        "multi_query_attention": True,
        "multi_query_group_num": attention.num_kv_heads,
        "num_attention_heads": attention.num_heads,
        "num_layers": spec.num_layers,
        "original_rope": True,
        "padded_vocab_size": spec.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": spec.position.theta / 10_000.0,
        "seq_length": spec.max_position_embeddings,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table: q | k | v and gate | up lie one after the other."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    queries = (attention.num_heads, attention.head_dim)
    keys_values = (attention.num_kv_heads, attention.head_dim)
    layer, ours = "transformer.encoder.layers.{}.", "layers/attention"
    return [
        Key("transformer.embedding.word_embeddings.weight", ("embedding",)),
        Key(layer + "input_layernorm.weight", ("layers/attention_norm/scale",)),
        *joined(
            layer + "self_attention.query_key_value",
            [f"{ours}/{name}" for name in "qkv"],
            [queries, keys_values, keys_values],
            width,
            bias=attention.qkv_bias,
        ),
        *linear(layer + "self_attention.dense", f"{ours}/o", queries, width),
        Key(layer + "post_attention_layernorm.weight", ("layers/mlp_norm/scale",)),
        *joined(layer + "mlp.dense_h_to_4h", ["layers/mlp/gate", "layers/mlp/up"], [inner, inner], width),
        *linear(layer + "mlp.dense_4h_to_h", "layers/mlp/down", inner, width),
        Key("transformer.encoder.final_layernorm.weight", ("final_norm/scale",)),
        head_key(spec, "transformer.output_layer.weight"),
    ]


INV_FREQ = (r"transformer\.rotary_pos_emb\.inv_freq",)

_ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")


def size(
    layers: int,
    *,
    vocab_size: int,
    positions: int,
    eps: float,
    rope_ratio: float = 1.0,
    kv_heads: int = 2,
    table: bool = False,
) -> ModelSpec:
    """Return a size of ChatGLM2, ChatGLM3 or GLM-4; `table`: the code has rotations for `positions` places only."""
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=4096,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(num_heads=32, num_kv_heads=kv_heads, head_dim=128, qkv_bias=True),
        position=half_rope(10_000.0 * rope_ratio, positions if table else None),
        mlp=MLP(intermediate_size=13_696),
        norm=Norm(eps=eps),
    )


def _generation(config: Config) -> str:
    """Tell the two, which have one layout, by what their published configs alone have."""
    return "chatglm3" if "rope_ratio" in config or config.get("seq_length") == 8192 else "chatglm2"


CHATGLM2 = Family(
    name="chatglm2",
    architectures=_ARCHITECTURES,
    model_types=("chatglm",),
    matches=lambda config: "multi_query_attention" in config and not isinstance(config.get("eos_token_id"), list),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=INV_FREQ,
    counts_past_prefix=False,
    tokenizer=lambda config: f"{_generation(config)}.model",
    chat=lambda config, tokens: "chatglm3" if "<|user|>" in tokens else "chatglm2",
    sizes={
        "chatglm2-6b": size(28, vocab_size=65_024, positions=32_768, eps=1e-5, table=True),
        "chatglm3-6b": size(28, vocab_size=65_024, positions=8192, eps=1e-5, table=True),
    },
)
