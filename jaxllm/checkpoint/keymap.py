"""One table of invertible ops between published tensors and our parameters, read in both directions.

A `Key` says which tensor of a checkpoint holds which parameters, and its op how: `to_jax` takes the published array
apart, `to_hf` puts it back. Ops are linear, so gradients map to published names the same way.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.errors import InputError

if TYPE_CHECKING:
    import numpy as np


class Op(Protocol):
    """An invertible rearrangement of one tensor."""

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """Take a published tensor apart into one array per parameter."""
        ...

    def to_hf(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """Put the published tensor back together."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the array."""
        return (array,)

    def to_hf(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the array."""
        return parts[0]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A torch Linear weight [out, in], ours [in..., out...].

    Attributes:
      inputs, outputs: our shapes of the two sides, e.g. outputs (N, H) for a query matrix.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the published tensor."""
        return (math.prod(self.outputs), math.prod(self.inputs))

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """Transpose and split the sides."""
        _expect_shape(array, self.shape)
        return (array.T.reshape(self.inputs + self.outputs),)

    def to_hf(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """Join the sides and transpose."""
        return parts[0].reshape(math.prod(self.inputs), -1).T


@dataclasses.dataclass(frozen=True)
class Bias:
    """A bias [out], ours in the shape of the output side."""

    outputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the published tensor."""
        return (math.prod(self.outputs),)

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """Split the output side."""
        _expect_shape(array, self.shape)
        return (array.reshape(self.outputs),)

    def to_hf(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """Join the output side."""
        return parts[0].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Concat:
    """Several tensors laid one after the other along the published output side (axis 0).

    Attributes:
      parts: the op of each.
    """

    parts: tuple[Linear | Bias, ...]

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """Cut and convert each part."""
        sizes = [op.shape[0] for op in self.parts]
        _expect_shape(array, (sum(sizes), *self.parts[0].shape[1:]))
        ends = itertools.accumulate(sizes)
        pieces = (array[end - size : end] for end, size in zip(ends, sizes, strict=True))
        return tuple(op.to_jax(piece)[0] for op, piece in zip(self.parts, pieces, strict=True))

    def to_hf(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """Convert and join the parts."""
        import numpy as np  # here, so that `import jaxllm`, which reads the family tables, does not pay for it

        return np.concatenate([op.to_hf((part,)) for op, part in zip(self.parts, parts, strict=True)])


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a table.

    Attributes:
      name: published name; "{}" stands for the layer number where the parameters are stacked over layers.
      paths: our parameters, "/"-separated.
      op: how the tensor maps to them.
    """

    name: str
    paths: tuple[str, ...]
    op: Op = Same()

    @property
    def stacked(self) -> bool:
        """Whether the row stands for one tensor in each layer."""
        return "{}" in self.name


def expand(keys: Sequence[Key], num_layers: int) -> dict[str, tuple[Key, int | None]]:
    """Return every published tensor name with its row and layer number."""
    names: dict[str, tuple[Key, int | None]] = {}
    for key in keys:
        for layer in range(num_layers) if key.stacked else (None,):
            names[key.name if layer is None else key.name.format(layer)] = (key, layer)
    return names


def get_path(tree: dict[str, Any], path: str) -> Any:
    """Return the node of a nested dict at a "/"-separated path."""
    for part in path.split("/"):
        tree = tree[part]
    return tree


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the node of a nested dict at a "/"-separated path, making dicts on the way."""
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def published_tensor(key: Key, layer: int | None, read: Callable[[str], Any]) -> np.ndarray:
    """Put one published tensor together; `read(path)` returns a whole parameter."""
    import numpy as np

    parts = (read(path) for path in key.paths)
    return key.op.to_hf(tuple(np.asarray(part if layer is None else part[layer]) for part in parts))


def _expect_shape(array: np.ndarray, shape: tuple[int, ...]) -> None:
    # Not only the number of elements: a transposed matrix would load as another one.
    if array.shape != shape:
        raise InputError(f"expected shape {shape}, found {array.shape}")
