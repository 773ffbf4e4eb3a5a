"""Low-rank products into peft's format: a pair of matrices beside each published tensor."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.hf import published_rows
from jaxllm.checkpoint.peft_names import (
    PREFIX,
    Tensors,
    is_embedding,
    layer_of,
    linears,
    product_at,
    short_names,
    with_inputs,
)
from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.families.base import Family
from jaxllm.families.keymap import Key, Row
from jaxllm.nn.adapter import Adapter, LowRank, adapted_paths
from jaxllm.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The products of one published tensor, in all layers.

    Attributes:
      members: our matrices in it, as numpy arrays; None where the adapter has nothing for one.
      is_shared: whether they have one first factor.
    """

    key: Key
    members: tuple[LowRank | None, ...]
    is_shared: bool

    @property
    def present(self) -> tuple[LowRank, ...]:
        return tuple(member for member in self.members if member is not None)

    @property
    def scale(self) -> float:
        return self.present[0].scale

    @property
    def rank(self) -> int:
        ranks = [member.a.shape[-1] for member in self.present]
        return ranks[0] if self.is_shared else sum(ranks)

    def factors(self, place: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return peft's A [r, in] and B [out, r] of one layer.

        Members with first factors of their own are blocks: their ranks follow each other, and each has zeros in the
        ranks of the others.
        """
        firsts, seconds, start = [], [], 0
        shapes = _output_shapes(self.key, self.present[0])
        for member, shape in zip(self.members, shapes, strict=True):
            b = np.zeros((self.rank, *shape), np.float32)
            if member is not None:
                a, rank = member.a[place], member.a.shape[-1]
                b[start : start + rank] = member.b[place] * np.float32(member.scale / self.scale)
                if not (self.is_shared and firsts):
                    firsts.append(a.reshape(-1, rank).T)
                start += 0 if self.is_shared else rank
            seconds.append(b)
        b = seconds[0].T if is_embedding(self.key) else with_inputs(self.key.op, self.rank).to_hf(tuple(seconds))
        return np.concatenate(firsts), b


def lora_to_peft(
    spec: ModelSpec, adapter: Adapter, config: AdapterConfig, family: Family
) -> tuple[Tensors, dict[str, Any]]:
    """Return peft's tensors and the fields of its config.

    Raises:
      InputError: an adapted matrix is in no tensor that peft can adapt.
    """
    arrays = jax.tree.map(np.asarray, adapter)
    rows = {name: row for name, row in published_rows(family, spec).items() if not row[0].copy}
    pairs = _pairs(arrays, rows)
    first_layer = spec.num_layers - (config.layers or spec.num_layers)
    tensors: Tensors = {}
    for name, (key, place) in rows.items():
        if key in pairs and (layer_of(name, key) is None or layer_of(name, key) >= first_layer):
            a, b = pairs[key].factors(place)
            kind = "lora_embedding_{}" if is_embedding(key) else "lora_{}.weight"
            module = PREFIX + name.removesuffix(".weight")
            tensors |= {f"{module}.{kind.format('A')}": a, f"{module}.{kind.format('B')}": b}
    return tensors, _fields(spec, config, pairs, {key for key, _ in rows.values()})


def _pairs(arrays: Adapter, rows: dict[str, Row]) -> dict[Key, _Pair]:
    left = adapted_paths(arrays)
    pairs = {}
    for key in dict.fromkeys(key for key, _ in rows.values()):
        members = tuple(product_at(arrays, path) for path in key.paths)
        if not any(member is not None for member in members):
            continue
        left -= set(key.paths)
        present = [member for member in members if member is not None]
        shared = len(present) == len(members) and all(np.array_equal(each.a, present[0].a) for each in present)
        pairs[key] = _Pair(key, members, shared)
    if left:
        raise InputError(f"adapter: {sorted(left)[0]} is in no published tensor of its own kind")
    return pairs


def _fields(spec: ModelSpec, config: AdapterConfig, pairs: dict[Key, _Pair], keys: set[Key]) -> dict[str, Any]:
    targets = short_names(pairs, keys)
    ranks = {name: pairs[key].rank for key, name in targets.items()}
    root = config.rank_stabilized
    exponent = 0.5 if root else 1
    alphas = {name: round(pairs[key].scale * ranks[name] ** exponent, 9) for key, name in targets.items()}
    rank, alpha = (collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    fields = {
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "target_modules": sorted(ranks),
        "use_rslora": root,
    }
    if config.layers is not None:
        alone = [key.name for key in pairs if "{}" not in key.name]
        if alone:
            raise InputError(f"adapter.layers: peft's format cannot say {config.layers} layers and {alone[0]} too")
        stacked = next(iter(pairs)).name
        fields["layers_to_transform"] = list(range(spec.num_layers - config.layers, spec.num_layers))
        fields["layers_pattern"] = stacked.split(".{}")[0].split(".")[-1]
    return fields


def _output_shapes(key: Key, low_rank: LowRank) -> list[tuple[int, ...]]:
    if is_embedding(key):
        return [low_rank.b.shape[1:]]
    return [part.outputs for part in linears(key.op)]
