"""DeepSeek LLM 7B and 67B (arXiv:2401.02954): LLaMA's layout with a vocabulary and chat format of its own."""

from __future__ import annotations

import dataclasses

from jaxllm.families.base import Family
from jaxllm.families.llama import LLAMA
from jaxllm.spec import GQA, MLP, ModelSpec, Norm, Rope

_VOCAB_SIZE = 102_400


def _size(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> ModelSpec:
    return ModelSpec(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=4096,
        attention=GQA(num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads),
        position=Rope(),
        mlp=MLP(intermediate_size=inner),
        norm=Norm(eps=1e-6),
    )


DEEPSEEK: Family = dataclasses.replace(
    LLAMA,
    name="deepseek",
    matches=lambda config: config.get("vocab_size") == _VOCAB_SIZE,
    tokenizer=lambda config: "deepseek_llm_tokenizer.json",
    chat=lambda config, tokens: "deepseek-llm",
    sizes={
        "deepseek-7b": _size(30, 4096, 11_008, 32, 32),
        "deepseek-67b": _size(95, 8192, 22_016, 64, 8),
    },
)
