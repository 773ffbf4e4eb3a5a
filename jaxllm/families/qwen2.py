"""Qwen2 (arXiv:2407.10671), dense: LLaMA's layout with biases on q, k and v; what Qwen v1 is exported as."""

from __future__ import annotations

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_width, require_parts
from jaxllm.families.llama import keys
from jaxllm.spec import GQA, MLP, Head, ModelSpec, Norm, Rope


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a Qwen2 config.json."""
    read = ConfigReader(config, "qwen2")
    read.ignore(*BOOKKEEPING, "use_mrope")
    read.expect("hidden_act", "silu")
    read.expect("attention_dropout", 0.0)
    read.expect("rope_scaling", None)
    hidden_size, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    num_layers = read.size("num_hidden_layers")
    spec = ModelSpec(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_position_embeddings=read.size("max_position_embeddings", default=32_768),
        attention=GQA(
            num_heads=num_heads,
            num_kv_heads=read.size("num_key_value_heads", default=num_heads),
            head_dim=read.size("head_dim", default=None) or head_width(hidden_size, num_heads),
            qkv_bias=True,
        ),
        position=Rope(theta=_theta(read)),
        mlp=MLP(intermediate_size=read.size("intermediate_size")),
        norm=Norm(eps=read.number("rms_norm_eps")),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
        window=_window(read, num_layers),
    )
    read.finish()
    return spec


def _theta(read: ConfigReader) -> float:
    inner = read.table("rope_parameters")  # transformers 5
    inner.expect("rope_type", "default")
    theta = read.number("rope_theta", default=inner.number("rope_theta", default=10_000.0))
    inner.finish()
    return theta


def _window(read: ConfigReader, num_layers: int) -> tuple[int | None, ...] | None:
    """Read the windows of the upper layers; the published models have a size for them and leave them off."""
    size, first = read.size("sliding_window", default=None), read.get("max_window_layers", default=28)
    kinds = read.get("layer_types", default=None)
    if not read.flag("use_sliding_window", default=False) or size is None:
        size, first = None, num_layers
    expected = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if kinds not in (None, expected):
        raise InputError(f"config.json (qwen2): layer_types and max_window_layers {first} contradict each other")
    return tuple(None if layer < first else size for layer in range(num_layers)) if first < num_layers else None


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a Qwen2 config.json for a spec.

    Raises:
      InputError: the spec has features that the layout cannot say.
    """
    require_parts(spec, "Qwen2", attention=GQA, position=Rope)
    windows = [size for size in spec.window or () if size is not None]
    attention = spec.attention
    # Published configs have no head_dim, and not every program reads it.
    usual = attention.num_heads * attention.head_dim == spec.hidden_size
    return ({} if usual else {"head_dim": attention.head_dim}) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "max_window_layers": spec.num_layers - len(windows),
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "rms_norm_eps": spec.norm.eps,
        "rope_theta": spec.position.theta,
        "sliding_window": windows[0] if windows else None,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": bool(windows),
        "vocab_size": spec.vocab_size,
    }


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    tokenizer=lambda config: "tokenizer.json",
    chat=lambda config, tokens: "chatml-qwen" if "<|im_start|>" in tokens else None,
    sizes={},
)
