"""What reading and writing low-rank products in peft's format share: published names, and matrices by path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.families.keymap import Concat, Key, Linear, PerGroup, get_path
from jaxllm.nn.adapter import Adapter, LowRank

Tensors = dict[str, np.ndarray]

PREFIX = "base_model.model."
"""What peft puts before the names of the modules that it wraps."""


def adaptable(key: Key) -> bool:
    """Tell whether a published tensor is a linear layer's or the embedding."""
    return (isinstance(key.op, Linear | Concat | PerGroup) and key.name.endswith(".weight")) or is_embedding(key)


def is_embedding(key: Key) -> bool:
    """Tell whether a published tensor is the embedding, whose factors peft names and lays out otherwise."""
    return key.paths == ("embedding",)


def short_names(adapted: Collection[Key], keys: Collection[Key]) -> dict[Key, str]:
    """Return for each adapted tensor the shortest end of its name that none of the other `keys` ends with.

    Raises:
      InputError: there is none.
    """
    modules = {key: key.name.removesuffix(".weight") for key in keys if adaptable(key)}
    names = {}
    for key in adapted:
        parts = modules[key].split("{}.")[-1].split(".")
        for end in (".".join(parts[-count:]) for count in range(1, len(parts) + 1)):
            if all(other in adapted for other, module in modules.items() if f".{module}".endswith(f".{end}")):
                names[key] = end
                break
        else:
            raise InputError(f"adapter: peft cannot name {key.name} without naming others")
    return names


def linears(op: Any) -> tuple[Linear, ...]:
    """Return the matrices that a published tensor holds."""
    return (op,) if isinstance(op, Linear) else op.parts


def with_inputs(op: Any, rank: int) -> Any:
    """Return the op of a second factor: the same outputs, `rank` inputs."""
    if isinstance(op, Linear):
        return dataclasses.replace(op, inputs=(rank,))
    return dataclasses.replace(op, parts=tuple(with_inputs(part, rank) for part in op.parts))


def layer_of(name: str, key: Key) -> int | None:
    """Return the layer of a published tensor, the first number in its name; None for one of no layer."""
    before, *after = key.name.split("{}", 1)
    return int(re.match(r"\d+", name[len(before) :])[0]) if after else None


def product_at(tree: Adapter, path: str) -> LowRank | None:
    """Return what an adapter has beside a matrix, or None."""
    try:
        node = get_path(tree, path)
    except KeyError:
        return None
    return node if isinstance(node, LowRank) else None
