"""The one place where parameters are declared.

A declaration gives shape, dtype, logical axes and how the parameter starts. Abstract shapes, shardings, counts and
initial values are all read from the tree of declarations, so nothing about a parameter is written twice.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxllm.sharding.staged import gather, local_shape

Kind = Literal["embedding", "matrix", "output", "ones", "zeros"]


class Declared(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A parameter's value (or abstract value) with its declaration."""

    value: Any
    axes: tuple[str, ...] = flax.struct.field(pytree_node=False)
    kind: Kind = flax.struct.field(pytree_node=False)
    fan_in: int = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """Return the bare value (Linen's protocol)."""
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        """Return the same declaration around another value (Linen's protocol)."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        """Note the axis that a scan stacks (Linen's protocol)."""
        axes = list(self.axes)
        axes.insert(index, params[nn.PARTITION_NAME])
        return self.replace(axes=tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        """Undo `add_axis` (Linen's protocol)."""
        axes = list(self.axes)
        axes.pop(index)
        return self.replace(axes=tuple(axes))


def param(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    kind: Kind,
    fan_in: int = 1,
    *,
    dtype: jnp.dtype | None = None,
    keep: tuple[str, ...] = (),
) -> jax.Array:
    """Declare a float32 parameter of `module` and return its value.

    Args:
      shape: one entry per logical axis of `axes`.
      kind: how it starts, see `initial_values`.
      fan_in: inputs summed into one output, for matrices.
      dtype: what the value is cast to; None: its own.
      keep: logical axes of which each device wants only its part, where weights are gathered by hand.
    """
    local = local_shape(shape, axes)

    def declare(key: jax.Array) -> Declared:
        del key
        return Declared(jnp.zeros(local, jnp.float32), axes, kind, fan_in)

    value = module.param(name, declare)
    # Cast first: what crosses the network has the narrower type.
    return gather(value if dtype is None else value.astype(dtype), axes, keep=keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializer:
    """Standard deviations of fresh parameters; norms start at one and biases at zero.

    Attributes:
      scheme: "normal" draws matrices with `std`; "fan_in" with fan_in^-1/2.
      output_scale: factor on the matrices that write to the residual stream.
    """

    scheme: Literal["normal", "fan_in"] = "normal"
    std: float = 0.02
    embedding_std: float = 0.02
    output_scale: float = 1.0

    def deviation(self, declared: Declared) -> float:
        """Return the standard deviation of one declared matrix."""
        if declared.kind == "embedding":
            return self.embedding_std
        std = self.std if self.scheme == "normal" else declared.fan_in**-0.5
        return std * (self.output_scale if declared.kind == "output" else 1.0)


def is_declared(value: Any) -> bool:
    """Tell whether a tree node is a declaration, for tree functions' `is_leaf`."""
    return isinstance(value, Declared)


def initial_values(declarations: Any, key: jax.Array, initializer: Initializer) -> Any:
    """Draw float32 values for a tree of declarations.

    Each matrix has a key derived from its path, so values depend neither on the mesh nor on other parameters, and a
    sharded draw never holds a whole parameter on one device.
    """

    def value(path: tuple[Any, ...], leaf: Declared) -> jax.Array:
        shape = leaf.value.shape
        if leaf.kind == "ones":
            return jnp.ones(shape, jnp.float32)
        if leaf.kind == "zeros":
            return jnp.zeros(shape, jnp.float32)
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.normal(leaf_key, shape, jnp.float32) * initializer.deviation(leaf)

    return jax.tree_util.tree_map_with_path(value, declarations, is_leaf=is_declared)
