"""Low-rank products as peft stores them: a pair of matrices beside each published tensor."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.hf import published_rows
from jaxllm.checkpoint.keymap import Concat, Key, Linear, PerGroup, Row, get_path, set_path
from jaxllm.config.alignment import AdapterConfig, AdapterTargetConfig
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES
from jaxllm.families.base import Family
from jaxllm.nn.adapter import Adapter, LowRank
from jaxllm.nn.model import abstract_params
from jaxllm.spec import ModelSpec

Tensors = dict[str, np.ndarray]

_PREFIX = "base_model.model."
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+?)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")

_UNREAD = (
    *("alora_invocation_tokens", "fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save"),
    *("target_parameters", "trainable_token_indices", "use_dora", "use_qalora"),
)
"""Options of peft that change what an adapter computes, and are not built here."""


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
        if isinstance(self.key.op, Linear | Concat | PerGroup):
            to_b = _with_inputs(self.key.op, self.rank).to_hf
        else:  # an embedding [V, D]
            to_b = lambda parts: parts[0].T  # noqa: E731
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
        return np.concatenate(firsts), to_b(tuple(seconds))


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
        if key in pairs and (_layer(name, key) is None or _layer(name, key) >= first_layer):
            a, b = pairs[key].factors(place)
            kind = "lora_embedding_{}" if key.paths == ("embedding",) else "lora_{}.weight"
            module = _PREFIX + name.removesuffix(".weight")
            tensors |= {f"{module}.{kind.format('A')}": a, f"{module}.{kind.format('B')}": b}
    return tensors, _fields(spec, config, pairs, [key for key, _ in rows.values()])


def _pairs(arrays: Adapter, rows: dict[str, Row]) -> dict[Key, _Pair]:
    left = {path for path, _ in _products(arrays)}
    pairs = {}
    for key in dict.fromkeys(key for key, _ in rows.values()):
        members = tuple(_found(arrays, path) for path in key.paths)
        if not any(member is not None for member in members):
            continue
        left -= set(key.paths)
        present = [member for member in members if member is not None]
        shared = len(present) == len(members) and all(np.array_equal(each.a, present[0].a) for each in present)
        pairs[key] = _Pair(key, members, shared)
    if left:
        raise InputError(f"adapter: {sorted(left)[0]} is in no published tensor of its own kind")
    return pairs


def _fields(spec: ModelSpec, config: AdapterConfig, pairs: dict[Key, _Pair], keys: list[Key]) -> dict[str, Any]:
    targets = _short_names(pairs, keys)
    ranks = {name: pairs[key].rank for key, name in targets.items()}
    root = config.rank_stabilized
    alphas = {name: pairs[key].scale * (ranks[name] ** (0.5 if root else 1)) for key, name in targets.items()}
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
        stacked = next(key.name for key in pairs if "{}" in key.name)
        fields["layers_to_transform"] = list(range(spec.num_layers - config.layers, spec.num_layers))
        fields["layers_pattern"] = stacked.split(".{}")[0].split(".")[-1]
    return fields


def _short_names(pairs: Sequence[Key], keys: Sequence[Key]) -> dict[Key, str]:
    """Return for each adapted tensor the shortest end of its name that no other linear tensor ends with."""
    modules = {key: key.name.removesuffix(".weight") for key in dict.fromkeys(keys) if key.name.endswith(".weight")}
    names = {}
    for key in pairs:
        parts = modules[key].split("{}.")[-1].split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        names[key] = next(
            (
                end
                for end in ends
                if all(other in pairs for other, module in modules.items() if f".{module}".endswith(f".{end}"))
            ),
            None,
        )
        if names[key] is None:
            raise InputError(f"adapter: peft cannot name {key.name} without naming others")
    return names


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
        found[key].append((_layer(f"{module}.weight", key), a.shape[0]))
        scale = _scale(module, a.shape[0], fields)
        for path, a_part, b_part in _parts(module, key, place, a, b, shapes):
            _put(adapter, path, place, a_part, b_part, scale, get_path(shapes, path).shape)
    return _config(spec, fields, found, [key for key, _ in rows.values()]), adapter


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


def _rows(spec: ModelSpec, modules: Any, family: Family | None) -> dict[str, Row]:
    """Return the published tensors of the layout that has all of these modules."""
    missing = ""
    for each in FAMILIES if family is None else (family,):
        try:
            each.to_hf(spec)
        except InputError:
            continue
        rows = {name: row for name, row in published_rows(each, spec).items() if not row[0].copy}
        if each.optional_prefix and all(module.startswith(each.optional_prefix) for module in modules):
            rows = {each.optional_prefix + name: row for name, row in rows.items()}
        unknown = [module for module in modules if f"{module}.weight" not in rows]
        if not unknown:
            return rows
        missing = missing or unknown[0]
    raise InputError(f"the adapter is for another model: it adapts {missing}, which this one does not have")


def _parts(module: str, key: Key, place: tuple[int, ...], a: np.ndarray, b: np.ndarray, shapes: Any):
    """Yield (path, a [inputs..., r], b [r, outputs...]) of one layer for each of our matrices in a tensor."""
    rank = a.shape[0]
    if key.paths == ("embedding",):
        width = get_path(shapes, "embedding").shape
        expected, parts, inputs = ((rank, width[0]), (width[1], rank)), (b.T,), width[:1]
    else:
        op = _with_inputs(key.op, rank)
        linear = _linears(key.op)
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
    low_rank = _found(adapter, path)
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
    if type(alpha) not in (int, float):
        raise InputError(f"lora_alpha = {alpha!r}, expected a number")
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _of_pattern(fields: dict[str, Any], name: str, module: str, default: Any) -> Any:
    """Return what peft takes for a module: of the first pattern that its name ends with, as a regular expression."""
    for pattern, value in (fields.get(name) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InputError(f"{name}: {pattern!r} is no regular expression: {error}") from error
    return default


def _config(
    spec: ModelSpec, fields: dict[str, Any], found: dict[Key, list[tuple[int | None, int]]], keys: list[Key]
) -> AdapterConfig:
    """Return the options that make an adapter of these tensors, with the layers and rank of each."""
    layers = {layer for places in found.values() for layer, _ in places if layer is not None}
    count = len(layers)
    if layers != set(range(spec.num_layers - count, spec.num_layers)):
        raise InputError(f"it adapts layers {sorted(layers)}; expected all, or the last ones")
    names = _short_names(found, keys)
    ranks = {name: found[key][0][1] for key, name in names.items()}
    rooted = bool(fields.get("use_rslora"))
    alphas = {name: _scale_alpha(fields, key) for key, name in names.items()}
    rank, alpha = (collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return AdapterConfig(
        targets=sorted(ranks),
        rank=rank,
        alpha=float(alpha),
        rank_stabilized=rooted,
        dropout=float(fields.get("lora_dropout") or 0.0),
        per_target=[
            AdapterTargetConfig(name=name, rank=ranks[name], alpha=float(alphas[name]))
            for name in sorted(ranks)
            if (ranks[name], alphas[name]) != (rank, alpha)
        ],
        layers=count if 0 < count < spec.num_layers else None,
    )


def _scale_alpha(fields: dict[str, Any], key: Key) -> float:
    module = key.name.removesuffix(".weight").replace("{}", "0")
    return _of_pattern(fields, "alpha_pattern", module, fields.get("lora_alpha"))


def _linears(op: Any) -> tuple[Linear, ...]:
    return (op,) if isinstance(op, Linear) else op.parts


def _with_inputs(op: Any, rank: int) -> Any:
    """Return the op of a second factor: the same outputs, `rank` inputs."""
    if isinstance(op, Linear):
        return dataclasses.replace(op, inputs=(rank,))
    return dataclasses.replace(op, parts=tuple(_with_inputs(part, rank) for part in op.parts))


def _output_shapes(key: Key, low_rank: LowRank) -> list[tuple[int, ...]]:
    if key.paths == ("embedding",):
        return [low_rank.b.shape[1:]]
    return [part.outputs for part in _linears(key.op)]


def _layer(name: str, key: Key) -> int | None:
    """Return the layer of a published tensor, the first number in its name; None for one of no layer."""
    before, *after = key.name.split("{}", 1)
    return int(re.match(r"\d+", name[len(before) :])[0]) if after else None


def _found(tree: Adapter, path: str) -> LowRank | None:
    try:
        node = get_path(tree, path)
    except KeyError:
        return None
    return node if isinstance(node, LowRank) else None


def _products(tree: Adapter) -> list[tuple[str, LowRank]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, LowRank))
    return [("/".join(key.key for key in path), leaf) for path, leaf in leaves]
