"""Low-rank products out of peft's format."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from jaxllm.checkpoint.hf import published_rows
from jaxllm.checkpoint.peft_names import (
    PREFIX,
    Tensors,
    adaptable,
    is_embedding,
    layer_of,
    linears,
    product_at,
    short_names,
    with_inputs,
)
from jaxllm.config.alignment import AdapterConfig, AdapterTargetConfig
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES
from jaxllm.families.base import Family
from jaxllm.families.keymap import Key, Row, get_path, set_path
from jaxllm.nn.adapter import Adapter, LowRank
from jaxllm.nn.model import abstract_params
from jaxllm.spec import ModelSpec

_NAME = re.compile(rf"{re.escape(PREFIX)}(.+?)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")

_UNREAD = (
    *("alora_invocation_tokens", "fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save"),
    *("target_parameters", "trainable_token_indices", "use_dora", "use_qalora"),
)
"""Options of peft that change what an adapter computes, and are not built here."""


def lora_from_peft(
    spec: ModelSpec, tensors: Tensors, fields: dict[str, Any], family: Family | None
) -> tuple[AdapterConfig, Adapter]:
    """Return the options and the arrays of a stored adapter.

    Raises:
      InputError: tensors that the model does not have, of other shapes, or for some of its layers only where peft has
        them anywhere but at the end; options that are not built here.
    """
    unread = [name for name in _UNREAD if fields.get(name)] + (["bias"] if fields.get("bias", "none") != "none" else [])
    if unread:
        raise InputError(f"{unread[0]} = {fields[unread[0]]!r} is not read here, expected none")
    modules = _modules(tensors)
    rows = _rows(spec, modules, family)
    adapter: Adapter = {}
    found: dict[Key, list[tuple[int | None, int]]] = collections.defaultdict(list)
    shapes = abstract_params(spec)
    for module, (a, b) in modules.items():
        key, place = rows[f"{module}.weight"]
        found[key].append((layer_of(f"{module}.weight", key), a.shape[0]))
        scale = _scale(module, a.shape[0], fields)
        for path, a_part, b_part in _parts(module, key, place, a, b, shapes):
            _put(adapter, path, place, a_part, b_part, scale, get_path(shapes, path).shape)
    return _config(spec, fields, found, {key for key, _ in rows.values()}), adapter


def _modules(tensors: Tensors) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    pairs: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise InputError(f"unknown tensor {name} of shape {tensor.shape}, expected NAME.lora_A.weight and lora_B")
        pairs[match[1]][match[3]] = tensor
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InputError(f"{module}: found {sorted(pair)}, expected A [r, in] and B [out, r]")
    if not pairs:
        raise InputError("there are no tensors")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(pairs.items())}


def _rows(spec: ModelSpec, modules: Collection[str], family: Family | None) -> dict[str, Row]:
    """Return the published tensors of the layout that has all of these modules."""
    missing = ""
    for each in FAMILIES if family is None else (family,):
        try:
            each.to_hf(spec)
        except InputError:
            continue
        rows = {name: row for name, row in published_rows(each, spec).items() if adaptable(row[0]) and not row[0].copy}
        if each.optional_prefix and all(module.startswith(each.optional_prefix) for module in modules):
            rows = {each.optional_prefix + name: row for name, row in rows.items()}
        unknown = [module for module in modules if f"{module}.weight" not in rows]
        if not unknown:
            return rows
        missing = missing or unknown[0]
    raise InputError(f"the adapter is for another model: it adapts {missing}, which this one does not have")


def _parts(
    module: str, key: Key, place: tuple[int, ...], a: np.ndarray, b: np.ndarray, shapes: Any
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (path, a [inputs..., r], b [r, outputs...]) of one layer for each of our matrices in a tensor."""
    rank = a.shape[0]
    if is_embedding(key):
        width = get_path(shapes, "embedding").shape
        expected, parts, inputs = ((rank, width[0]), (width[1], rank)), (b.T,), width[:1]
    else:
        op = with_inputs(key.op, rank)
        linear = linears(key.op)
        outputs = sum(math.prod(each.outputs) for each in linear)
        inputs = linear[0].inputs
        expected = ((rank, math.prod(inputs)), (outputs, rank))
        parts = op.to_jax(b) if b.shape == expected[1] else ()
    if (a.shape, b.shape) != expected:
        raise InputError(
            f"the adapter is for another model: {module} has A {a.shape} and B {b.shape}, expected {expected[0]} and "
            f"{expected[1]}"
        )
    for path, part in zip(key.paths, parts, strict=True):
        yield path, a.T.reshape(*inputs, rank), part


def _put(
    adapter: Adapter,
    path: str,
    place: tuple[int, ...],
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    shape: tuple[int, ...],
) -> None:
    low_rank = product_at(adapter, path)
    if low_rank is None:
        lead = shape[: len(place)]
        low_rank = LowRank(
            np.zeros((*lead, *a.shape), np.float32), np.zeros((*lead, *b.shape), np.float32), scale=scale
        )
        set_path(adapter, path, low_rank)
    if low_rank.a.shape[len(place) :] != a.shape or low_rank.scale != scale:
        raise InputError(f"{path} has other ranks or alphas in some layers; expected the same in all")
    low_rank.a[place], low_rank.b[place] = a, b


def _scale(module: str, rank: int, fields: dict[str, Any]) -> float:
    expected = _of_pattern(fields, "rank_pattern", module, fields.get("r"))
    if rank != expected:
        raise InputError(f"{module} has rank {rank}, adapter_config.json says {expected!r}")
    alpha = _of_pattern(fields, "alpha_pattern", module, fields.get("lora_alpha"))
    if type(alpha) not in (int, float) or not alpha > 0:
        raise InputError(f"lora_alpha = {alpha!r}, expected a positive number")
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _of_pattern(fields: dict[str, Any], name: str, module: str, default: Any) -> Any:
    """Return what peft takes for a module: of the first pattern that its name ends with, as a regular expression."""
    patterns = fields.get(name) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{name} = {patterns!r:.80}, expected an object")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InputError(f"{name}: {pattern!r} is no regular expression: {error}") from error
    return default


def _config(
    spec: ModelSpec, fields: dict[str, Any], found: dict[Key, list[tuple[int | None, int]]], keys: set[Key]
) -> AdapterConfig:
    """Return the options that make an adapter of these tensors, with the layers and rank of each."""
    layers = {layer for places in found.values() for layer, _ in places if layer is not None}
    count = len(layers)
    if layers != set(range(spec.num_layers - count, spec.num_layers)):
        raise InputError(f"it adapts layers {sorted(layers)}; expected all, or the last ones")
    dropout = fields.get("lora_dropout", 0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"lora_dropout = {dropout!r}, expected a number from 0 to below 1")
    names = short_names(found, keys)
    ranks = {name: found[key][0][1] for key, name in names.items()}
    alphas = {name: _alpha(fields, key) for key, name in names.items()}
    rank, alpha = (collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return AdapterConfig(
        targets=sorted(ranks),
        rank=rank,
        alpha=float(alpha),
        rank_stabilized=bool(fields.get("use_rslora")),
        dropout=float(dropout),
        per_target=[
            AdapterTargetConfig(name=name, rank=ranks[name], alpha=float(alphas[name]))
            for name in sorted(ranks)
            if (ranks[name], alphas[name]) != (rank, alpha)
        ],
        layers=count if 0 < count < spec.num_layers else None,
    )


def _alpha(fields: dict[str, Any], key: Key) -> float:
    module = key.name.removesuffix(".weight").replace("{}", "0")
    return _of_pattern(fields, "alpha_pattern", module, fields.get("lora_alpha"))
