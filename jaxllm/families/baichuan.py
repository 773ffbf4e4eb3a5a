"""Baichuan 7B and 13B, Baichuan2 7B and 13B (arXiv:2309.10305)."""

from __future__ import annotations

from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_width, require_parts
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.families.llama import INV_FREQ, keys_around_attention
from jaxllm.spec import GQA, MLP, Alibi, Head, ModelSpec, Norm, Rope

_VOCAB_SIZES = {64_000: False, 125_696: True}
"""Whether the published vocabulary of this size comes with a normalised head (Baichuan2) or not."""


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a Baichuan config.json.

    All sizes share one model_type. Those with `max_position_embeddings` have rotary positions, those with
    `model_max_length` alone ALiBi. Baichuan2 is told by its vocabulary, or else by its z-loss weight.
    """
    read = ConfigReader(config, "baichuan")
    read.ignore(*BOOKKEEPING)
    read.expect("hidden_act", "silu")
    hidden_size, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    rotary_length = read.size("max_position_embeddings", default=None)
    max_length = read.size("model_max_length", default=4096)
    vocab_size, z_loss = read.size("vocab_size"), read.weight("z_loss_weight", default=0.0)
    spec = ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=read.size("num_hidden_layers"),
        max_position_embeddings=rotary_length or max_length,
        attention=GQA(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_width(hidden_size, num_heads)),
        position=Rope() if rotary_length else Alibi(),
        mlp=MLP(intermediate_size=read.size("intermediate_size")),
        norm=Norm(eps=read.number("rms_norm_eps")),
        head=Head(
            tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
            normalized=_is_normalized(config),
            max_z_loss=z_loss,
        ),
    )
    read.finish()
    return spec


def _is_normalized(config: Config) -> bool:
    return _VOCAB_SIZES.get(config.get("vocab_size"), "z_loss_weight" in config)


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a Baichuan config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "Baichuan", attention=GQA, position=(Rope, Alibi))
    length = "max_position_embeddings" if isinstance(spec.position, Rope) else "model_max_length"
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp.intermediate_size,
        length: spec.max_position_embeddings,
        "num_attention_heads": spec.attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "rms_norm_eps": spec.norm.eps,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    return config | ({"z_loss_weight": spec.head.max_z_loss} if spec.head.normalized else {})


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of a Baichuan checkpoint: as LLaMA's, with q | k | v in one matrix. The head is stored raw."""
    width, heads = (spec.hidden_size,), (spec.attention.num_heads, spec.attention.head_dim)
    block, ours = "model.layers.{}.self_attn", "layers/attention"
    return [
        *joined(f"{block}.W_pack", [f"{ours}/{name}" for name in "qkv"], [heads] * 3, width),
        *linear(f"{block}.o_proj", f"{ours}/o", heads, width),
        *keys_around_attention(spec),
    ]


def _size(layers: int, hidden: int, inner: int, heads: int, *, vocab_size: int, rotary: bool) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=4096,
        attention=GQA(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads),
        position=Rope() if rotary else Alibi(),
        mlp=MLP(intermediate_size=inner),
        norm=Norm(eps=1e-6),
        head=Head(normalized=_VOCAB_SIZES[vocab_size]),
    )


def _generation(config: Config) -> str:
    return "baichuan2" if _is_normalized(config) else "baichuan"


BAICHUAN = Family(
    name="baichuan",
    # Baichuan-7B's class is spelt with a capital C.
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    model_types=("baichuan",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=INV_FREQ,
    tokenizer=lambda config: f"{_generation(config)}.model",
    chat=lambda config, tokens: _generation(config),
    sizes={
        "baichuan-7b": _size(32, 4096, 11008, 32, vocab_size=64_000, rotary=True),
        "baichuan-13b": _size(40, 5120, 13696, 40, vocab_size=64_000, rotary=False),
        "baichuan2-7b": _size(32, 4096, 11008, 32, vocab_size=125_696, rotary=True),
        "baichuan2-13b": _size(40, 5120, 13696, 40, vocab_size=125_696, rotary=False),
    },
)
