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
class PerGroup:
    """Several tensors interleaved along the published output side: for each group a share of each of them.

    With one group a head these are GLM-130B's rows [q k v] of head 0, of head 1 ...; with one group a key/value head
    InternLM2's, whose share of the queries is several heads.

    Attributes:
      num_groups: how many equal shares each part is cut into.
      parts: the op of each.
    """

    num_groups: int
    parts: tuple[Linear | Bias, ...]

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """Collect and convert each part."""
        _expect_shape(array, (sum(op.shape[0] for op in self.parts), *self.parts[0].shape[1:]))
        shares = [op.shape[0] // self.num_groups for op in self.parts]
        groups = array.reshape(self.num_groups, sum(shares), *array.shape[1:])
        ends = itertools.accumulate(shares)
        pieces = (groups[:, end - share : end] for end, share in zip(ends, shares, strict=True))
        return tuple(op.to_jax(piece.reshape(op.shape))[0] for op, piece in zip(self.parts, pieces, strict=True))

    def to_hf(self, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        """Convert and interleave the parts."""
        import numpy as np

        published = [op.to_hf((part,)) for op, part in zip(self.parts, parts, strict=True)]
        groups = [tensor.reshape(self.num_groups, -1, *tensor.shape[1:]) for tensor in published]
        return np.concatenate(groups, axis=1).reshape(-1, *published[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a table.

    Attributes:
      name: published name; each "{}" stands for a number (a layer's, an expert's) of parameters stacked on an axis.
      paths: our parameters, "/"-separated.
      op: how the tensor maps to them.
      stack: the numbers that each "{}" runs through; None: one "{}", through all layers.
      copy: whether other rows hold the parameters too: published files carry a tied output matrix twice, or once.
    """

    name: str
    paths: tuple[str, ...]
    op: Op = Same()
    stack: tuple[range, ...] | None = None
    copy: bool = False


Row = tuple[Key, tuple[int, ...]]
"""A key and the place of one of its tensors on the stacked axes of its parameters; () where nothing is stacked."""


def linear(
    name: str,
    path: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    bias: bool = False,
    stack: tuple[range, ...] | None = None,
) -> list[Key]:
    """Return the rows of a torch Linear: NAME.weight for PATH/kernel and, if it has one, NAME.bias for PATH/bias."""
    rows = [Key(f"{name}.weight", (f"{path}/kernel",), Linear(inputs, outputs), stack)]
    if bias:
        rows.append(Key(f"{name}.bias", (f"{path}/bias",), Bias(outputs), stack))
    return rows


def joined(
    name: str,
    paths: Sequence[str],
    outputs: Sequence[tuple[int, ...]],
    inputs: tuple[int, ...],
    *,
    bias: bool = False,
    num_groups: int | None = None,
    stack: tuple[range, ...] | None = None,
) -> list[Key]:
    """Return the rows of one torch Linear that holds several of our matrices, in this order.

    Args:
      paths, outputs: of each matrix.
      num_groups: the matrices are interleaved in this many groups (see PerGroup); None: they lie one after the other.
    """

    def row(leaf: str, parts: tuple[Linear | Bias, ...]) -> Key:
        op = Concat(parts) if num_groups is None else PerGroup(num_groups, parts)
        published = {"kernel": "weight", "bias": "bias"}[leaf]
        return Key(f"{name}.{published}", tuple(f"{path}/{leaf}" for path in paths), op, stack)

    rows = [row("kernel", tuple(Linear(inputs, shape) for shape in outputs))]
    return rows + ([row("bias", tuple(map(Bias, outputs)))] if bias else [])


def expand(keys: Sequence[Key], num_layers: int) -> dict[str, Row]:
    """Return every published tensor name with its row and its place on the stacked axes."""
    names: dict[str, Row] = {}
    for key in keys:
        stack = key.stack
        if stack is None:
            stack = (range(num_layers),) * key.name.count("{}")
        for numbers in itertools.product(*stack):
            place = tuple(number - along.start for number, along in zip(numbers, stack, strict=True))
            names[key.name.format(*numbers)] = (key, place)
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


def published_tensor(row: Row, read: Callable[[str], Any]) -> np.ndarray:
    """Put one published tensor together; `read(path)` returns a whole parameter."""
    import numpy as np

    key, place = row
    return key.op.to_hf(tuple(np.asarray(read(path)[place] if place else read(path)) for path in key.paths))


def _expect_shape(array: np.ndarray, shape: tuple[int, ...]) -> None:
    # Not only the number of elements: a transposed matrix would load as another one.
    if array.shape != shape:
        raise InputError(f"expected shape {shape}, found {array.shape}")
