"""Prefixes as peft's prefix tuning and THUDM's P-tuning store them: all layers' keys and values in one row a place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.peft_names import Tensors
from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.families import family_of_spec
from jaxllm.families.base import Family
from jaxllm.nn.adapter import Adapter, Prefix
from jaxllm.nn.position import apply_rope, rope_tables
from jaxllm.spec import GQA, ModelSpec, Rope, Yarn

ENCODER = "transformer.prefix_encoder."


def prefix_to_peft(
    spec: ModelSpec, adapter: Adapter, config: AdapterConfig, family: Family
) -> tuple[Tensors, dict[str, Any]]:
    """Return peft's tensors and the fields of its config."""
    del config
    attention = spec.attention
    prefixes = [adapter[group.name]["attention"]["prefix"] for group in spec.layer_groups]
    k, v = (np.concatenate([np.asarray(getattr(each, name)) for each in prefixes]) for name in ("k", "v"))
    layers, length, heads, width = k.shape
    k = _turned(spec, family, k, length)
    rows = np.stack([k, v], axis=1).transpose(2, 0, 1, 3, 4).reshape(length, -1)
    return {"prompt_embeddings": rows}, {
        "encoder_hidden_size": None,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": attention.num_kv_heads * width,
    }


def prefix_from_peft(
    spec: ModelSpec, tensors: Tensors, fields: dict[str, Any], family: Family | None
) -> tuple[AdapterConfig, Adapter]:
    """Return the options and the arrays of a stored prefix; one made by a network comes as what the network gave.

    Raises:
      InputError: it is for a model of other sizes, or of positions that peft's cannot be brought to.
    """
    del fields
    if set(tensors) != {"prompt_embeddings"}:
        raise InputError(f"found tensors {sorted(tensors)[:5]}, expected prompt_embeddings alone")
    k, v = _split(spec, tensors["prompt_embeddings"], "prompt_embeddings")
    return _loaded(spec, _turned(spec, family or family_of_spec(spec), k, -k.shape[1]), v)


def prefix_from_thudm(spec: ModelSpec, tensors: Tensors) -> tuple[AdapterConfig, Adapter]:
    """Return the options and the arrays of a PrefixEncoder of ChatGLM-6B's and ChatGLM2-6B's ptuning folders.

    Raises:
      InputError: it is for a model of other sizes.
    """
    rest = {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}
    names = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    expected = ({"embedding.weight"}, {"embedding.weight", *names})
    if set(rest) not in expected:
        raise InputError(f"found {sorted(tensors)}, expected {ENCODER}embedding.weight, or also trans.0 and trans.2")
    rows = rest["embedding.weight"]
    if len(rest) > 1:
        inner, inner_bias, outer, outer_bias = (rest[name] for name in names)
        shapes = [part.shape for part in (rows, inner, outer)]
        if any(len(shape) != 2 for shape in shapes) or rows.shape[1] != inner.shape[1]:
            raise InputError(f"the layers of {ENCODER}trans have shapes {shapes}, which do not follow each other")
        rows = np.tanh(rows @ inner.T + inner_bias) @ outer.T + outer_bias
    return _loaded(spec, *_split(spec, rows, f"{ENCODER}embedding.weight"))


def _split(spec: ModelSpec, rows: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return k and v [L, P, K, H] of rows [P, L * 2 * K * H]."""
    attention = spec.attention
    if not isinstance(attention, GQA):
        raise InputError("the adapter is for another model: latent attention has no place for a prefix")
    width = spec.num_layers * 2 * attention.num_kv_heads * attention.head_dim
    if rows.ndim != 2 or rows.shape[1] != width:
        raise InputError(f"the adapter is for another model: {name} has shape {rows.shape}, expected [places, {width}]")
    parts = rows.reshape(len(rows), spec.num_layers, 2, attention.num_kv_heads, attention.head_dim)
    k, v = parts.transpose(2, 1, 0, 3, 4)
    return np.ascontiguousarray(k), np.ascontiguousarray(v)


def _loaded(spec: ModelSpec, k: np.ndarray, v: np.ndarray) -> tuple[AdapterConfig, Adapter]:
    adapter = {
        group.name: {"attention": {"prefix": Prefix(k[group.start : group.stop], v[group.start : group.stop])}}
        for group in spec.layer_groups
    }
    return AdapterConfig(kind="prefix", prefix_length=k.shape[1]), adapter


def _turned(spec: ModelSpec, family: Family, k: np.ndarray, positions: int) -> np.ndarray:
    """Rotate keys [L, P, K, H] by so many positions, where the family's code numbers tokens after the prefix.

    Here the first token is at 0 whatever stands before it, so the keys are turned instead of the numbers.
    """
    if not family.counts_past_prefix:
        return k
    if not isinstance(spec.position, Rope) or isinstance(spec.position.scaling, Yarn):
        raise InputError(
            f"peft numbers tokens after the prefix, which cannot be undone for {type(spec.position).__name__} positions"
        )
    flat = jnp.asarray(k.reshape(1, -1, *k.shape[2:]))
    turns = jnp.full(flat.shape[:2], positions, jnp.int32)
    tables = rope_tables(spec.position, turns, spec.rotary_dim, length=jnp.ones(1, jnp.int32), train=True)
    return np.asarray(jax.device_get(apply_rope(flat, tables))).reshape(k.shape)
