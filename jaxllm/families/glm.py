"""GLM Base ... 10B (arXiv:2103.10360): blank infilling with two learned positions and a prefix that all tokens see."""

from __future__ import annotations

from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_width, require_parts
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, Head, LearnedBlock, ModelSpec, Norm

_TRAINING_KEYS = (
    "attention_dropout_prob",
    "embedding_dropout_prob",
    "output_dropout_prob",
    "checkpoint_activations",
    "checkpoint_num_layers",
    "parallel_output",
    "pool_token",
    "spell_func",
    "spell_length",
    # Scores are divided before and multiplied after their maximum is taken away: the same mathematics.
    "attention_scale",
)


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a GLM config.json."""
    read = ConfigReader(config, "glm")
    read.ignore(*BOOKKEEPING, *_TRAINING_KEYS)
    read.expect("block_position_encoding", True)
    read.expect("relative_encoding", False)
    read.expect("output_predict", True)
    spec = _spec(
        layers=read.size("num_layers"),
        hidden=read.size("hidden_size"),
        heads=read.size("num_attention_heads"),
        vocab_size=read.size("vocab_size"),
        positions=read.size("max_sequence_length"),
        eps=read.number("layernorm_epsilon", default=1e-5),
    )
    read.expect("tie_word_embeddings", True)
    read.finish()
    return spec


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a GLM config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "GLM", attention=GQA, position=LearnedBlock)
    return {
        "architectures": ["GLMModel"],
        "model_type": "glm",
        "attention_scale": 1.0,
        "block_position_encoding": True,
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "layernorm_epsilon": spec.norm.eps,
        "max_sequence_length": spec.max_position_embeddings,
        "num_attention_heads": spec.attention.num_heads,
        "num_layers": spec.num_layers,
        "output_predict": True,
        "relative_encoding": False,
        "vocab_size": spec.vocab_size,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of a GLM checkpoint: q | k | v lie one after the other; the output matrix is the embedding."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    heads = (attention.num_heads, attention.head_dim)
    layer, ours = "transformer.layers.{}.", "layers/attention"
    return [
        Key("word_embeddings.weight", ("embedding",)),
        Key("transformer.position_embeddings.weight", ("position_embedding",)),
        Key("transformer.block_position_embeddings.weight", ("block_position_embedding",)),
        *joined(
            layer + "attention.query_key_value", [f"{ours}/{name}" for name in "qkv"], [heads] * 3, width, bias=True
        ),
        *linear(layer + "attention.dense", f"{ours}/o", heads, width, bias=True),
        *linear(layer + "mlp.dense_h_to_4h", "layers/mlp/up", width, inner, bias=True),
        *linear(layer + "mlp.dense_4h_to_h", "layers/mlp/down", inner, width, bias=True),
        *layer_norm_keys(layer + "input_layernorm", "layers/attention_norm"),
        *layer_norm_keys(layer + "post_attention_layernorm", "layers/mlp_norm"),
        *layer_norm_keys("transformer.final_layernorm", "final_norm"),
    ]


def layer_norm_keys(name: str, path: str) -> list[Key]:
    """Return the rows of a LayerNorm's scale and bias."""
    return [Key(f"{name}.weight", (f"{path}/scale",)), Key(f"{name}.bias", (f"{path}/bias",))]


def _spec(*, layers: int, hidden: int, heads: int, vocab_size: int, positions: int, eps: float = 1e-5) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(
            num_heads=heads, num_kv_heads=heads, head_dim=head_width(hidden, heads), qkv_bias=True, out_bias=True
        ),
        # One row more than positions: a block's place counts from 1.
        position=LearnedBlock(num_positions=positions + 1),
        mlp=MLP(intermediate_size=4 * hidden, activation="gelu_tanh", gated=False, bias=True),
        norm=Norm(kind="layer", eps=eps),
        head=Head(tie_word_embeddings=True),
        mask="prefix",
    )


def _size(layers: int, hidden: int, heads: int, vocab_size: int, positions: int) -> ModelSpec:
    return _spec(layers=layers, hidden=hidden, heads=heads, vocab_size=vocab_size, positions=positions)


def _tokenizer(config: Config) -> str | None:
    if config.get("vocab_size") != 50_048:
        return None
    return "glm_large_chinese.model" if config.get("hidden_size") == 1024 else "glm_10b_chinese.model"


GLM = Family(
    name="glm",
    architectures=("GLMModel", "GLMForConditionalGeneration"),
    model_types=("glm",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    aligned_labels=True,
    optional_prefix="glm.",
    tokenizer=_tokenizer,
    sizes={
        "glm-base": _size(12, 768, 12, 30_592, 512),
        "glm-large": _size(24, 1024, 16, 30_592, 512),
        "glm-large-chinese": _size(24, 1024, 16, 50_048, 1024),
        "glm-410m": _size(30, 1024, 16, 30_592, 512),
        "glm-515m": _size(30, 1152, 18, 30_592, 512),
        "glm-2b": _size(36, 2048, 32, 50_304, 1024),
        "glm-10b": _size(48, 4096, 64, 50_304, 1024),
        "glm-10b-chinese": _size(48, 4096, 64, 50_048, 1024),
    },
)
