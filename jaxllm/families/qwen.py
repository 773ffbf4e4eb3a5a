"""Qwen v1 (arXiv:2309.16609), in both dialects of its config.json."""

from __future__ import annotations

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, require_parts
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, ChunkedNTK, Head, LogN, ModelSpec, Norm, Rope


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a Qwen v1 config.json, of August 2023 (n_embd ...) or later (hidden_size ...).

    `intermediate_size` there is twice the inner width of the gated MLP.
    """
    read = ConfigReader(config, "qwen")
    read.ignore(*BOOKKEEPING, "tokenizer_type", "onnx_safe", "params_dtype", "use_flash_attn", "softmax_in_fp32")
    read.ignore("bf16", "fp16", "fp32", "bias_dropout_fusion", "use_cache_kernel")
    read.ignore("attn_dropout_prob", "emb_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    read.expect("activation", "swiglu")
    read.expect("apply_residual_connection_post_layernorm", False)
    read.expect("pos_emb", "rotary")
    read.expect("rotary_pct", 1.0)
    read.expect("no_bias", True)
    read.expect("scale_attn_weights", True)
    read.expect("use_cache_quantization", False)
    num_heads, train_length = read.size("num_attention_heads", "n_head"), read.size("seq_length")
    unpadded = read.size("vocab_size", default=None)
    spec = ModelSpec(
        vocab_size=read.size("padded_vocab_size", default=unpadded),
        hidden_size=read.size("hidden_size", "n_embd"),
        num_layers=read.size("num_hidden_layers", "n_layer"),
        max_position_embeddings=read.size("max_position_embeddings", "n_positions"),
        attention=GQA(num_heads=num_heads, num_kv_heads=num_heads, head_dim=read.size("kv_channels"), qkv_bias=True),
        position=Rope(
            theta=read.number("rotary_emb_base", "rope_theta"),
            scaling=ChunkedNTK(train_length=train_length) if read.flag("use_dynamic_ntk", default=False) else None,
        ),
        mlp=MLP(intermediate_size=read.size("intermediate_size", "ffn_hidden_size") // 2),
        norm=Norm(eps=read.number("layer_norm_epsilon")),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
        logn=LogN(train_length=train_length) if read.flag("use_logn_attn", default=False) else None,
    )
    read.finish()
    return spec


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a Qwen v1 config.json for a spec.

    Raises:
      InputError: the spec has features that the layout cannot say.
    """
    require_parts(spec, "Qwen", attention=GQA, position=Rope)
    scaling, attention = spec.position.scaling, spec.attention
    if scaling is not None and not isinstance(scaling, ChunkedNTK):
        raise InputError(f"a Qwen config cannot express {type(scaling).__name__}")
    if attention.num_heads != attention.num_kv_heads or not attention.qkv_bias or attention.out_bias:
        raise InputError("a Qwen config means as many key/value heads as query heads, and biases on q, k, v alone")
    if spec.mlp.bias:
        raise InputError("a Qwen config cannot express biases in the feed-forward layers")
    if spec.window is not None:
        raise InputError("a Qwen config cannot express attention windows: the released code has none")
    lengths = {part.train_length for part in (scaling, spec.logn) if part is not None} or {spec.max_position_embeddings}
    if len(lengths) > 1:
        raise InputError(f"a Qwen config has one seq_length, found train lengths {sorted(lengths)}")
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 2 * spec.mlp.intermediate_size,
        "kv_channels": attention.head_dim,
        "layer_norm_epsilon": spec.norm.eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "no_bias": True,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "rotary_emb_base": spec.position.theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": lengths.pop(),
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "use_dynamic_ntk": scaling is not None,
        "use_logn_attn": spec.logn is not None,
        "vocab_size": spec.vocab_size,
    }


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of a Qwen v1 checkpoint: fused q | k | v thirds; w2 is the gate, w1 the up projection."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    heads = (attention.num_heads, attention.head_dim)
    layer = "transformer.h.{}."
    fused = [f"layers/attention/{name}" for name in "qkv"]
    return [
        Key("transformer.wte.weight", ("embedding",)),
        Key(layer + "ln_1.weight", ("layers/attention_norm/scale",)),
        *joined(layer + "attn.c_attn", fused, [heads] * 3, width, bias=True),
        *linear(layer + "attn.c_proj", "layers/attention/o", heads, width),
        Key(layer + "ln_2.weight", ("layers/mlp_norm/scale",)),
        *linear(layer + "mlp.w1", "layers/mlp/up", width, inner),
        *linear(layer + "mlp.w2", "layers/mlp/gate", width, inner),
        *linear(layer + "mlp.c_proj", "layers/mlp/down", inner, width),
        Key("transformer.ln_f.weight", ("final_norm/scale",)),
        head_key(spec, "lm_head.weight"),
    ]


def _size(
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    *,
    vocab_size: int,
    train_length: int,
    positions: int,
    theta: float = 10_000.0,
    long_context: bool = True,
) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=positions,
        attention=GQA(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, qkv_bias=True),
        position=Rope(theta=theta, scaling=ChunkedNTK(train_length=train_length) if long_context else None),
        mlp=MLP(intermediate_size=inner),
        norm=Norm(eps=1e-6),
        logn=LogN(train_length=train_length) if long_context else None,
    )


# A size of our own, for the quickstart and small experiments: a vocabulary of 2,048 made by `jaxllm tokenizer train`.
_MINI = _size(4, 128, 352, 2, vocab_size=2048, train_length=128, positions=1024)

QWEN = Family(
    name="qwen",
    architectures=("QWenLMHeadModel",),
    model_types=("qwen",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=(r"transformer\.h\.\d+\.attn\.(rotary_emb\.inv_freq|logn_tensor)", r"transformer\.rotary_emb\.inv_freq"),
    tokenizer=lambda config: "qwen.tiktoken",
    chat=lambda config, tokens: "chatml-qwen",
    sizes={
        "qwen-1.8b": _size(24, 2048, 5504, 16, vocab_size=151_936, train_length=8192, positions=8192),
        "qwen-7b": _size(32, 4096, 11008, 32, vocab_size=151_936, train_length=8192, positions=32768),
        "qwen-14b": _size(40, 5120, 13696, 40, vocab_size=152_064, train_length=2048, positions=8192),
        "qwen-72b": _size(
            80, 8192, 24576, 64, vocab_size=152_064, train_length=8192, positions=8192, theta=1e6, long_context=False
        ),
        "qwen-mini": _MINI,
    },
)
