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
from jax.sharding import Mesh

from jaxllm.nn.quantized import Quantized, Weight
from jaxllm.sharding.rules import RULES, sharding_for
from jaxllm.sharding.staged import gather, local_shape

Kind = Literal["embedding", "matrix", "output", "ones", "zeros", "uniform", "unit", "zero_matrix", "score"]
"""How a parameter starts: "uniform" within fan_in^-1/2 (what torch's Linear and peft's first factor start from), "unit"
normal with deviation 1 (torch's Embedding), "zero_matrix" with zeros, "score" normal with (fan_in + 1)^-1/2."""


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
) -> Weight:
    """Declare a float32 parameter of `module` and return its value, or the codes that a frozen matrix is held as.

    Args:
      shape: one entry per logical axis of `axes`.
      kind: how it starts, see `initial_values`.
      fan_in: inputs summed into one output, for matrices.
      dtype: what the value is cast to; None: its own.
      keep: logical axes of which each device wants only its part, where weights are gathered by hand.
    """
    held = module.get_variable("params", name)
    if isinstance(held, Quantized):
        return held.gathered(axes, keep)
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
        if declared.kind == "unit":
            return 1.0
        if declared.kind == "score":
            return (declared.fan_in + 1) ** -0.5
        std = self.std if self.scheme == "normal" else declared.fan_in**-0.5
        return std * (self.output_scale if declared.kind == "output" else 1.0)


def is_declared(value: Any) -> bool:
    """Tell whether a tree node is a declaration, for tree functions' `is_leaf`."""
    return isinstance(value, Declared)


def abstract_values(declarations: Any, mesh: Mesh | None = None, dtype: jnp.dtype | None = jnp.float32) -> Any:
    """Return a tree of declarations as jax.ShapeDtypeStruct, with their shardings if a mesh is given.

    Args:
      dtype: of all of them; None: as declared.

    Raises:
      InputError: a dimension does not divide over its mesh axes.
    """

    def abstract(leaf: Declared) -> jax.ShapeDtypeStruct:
        shape = leaf.value.shape
        sharding = None if mesh is None else sharding_for(shape, leaf.axes, mesh)
        return jax.ShapeDtypeStruct(shape, leaf.value.dtype if dtype is None else dtype, sharding=sharding)

    return jax.tree.map(abstract, declarations, is_leaf=is_declared)


def partition_specs(declarations: Any) -> Any:
    """Return the PartitionSpecs of a tree of declarations."""
    return jax.tree.map(lambda leaf: RULES.spec(leaf.axes), declarations, is_leaf=is_declared)


def decayed(declarations: Any) -> Any:
    """Return True for each parameter that weight decay shrinks: matrices and embeddings, no norms and biases."""
    return jax.tree.map(lambda leaf: leaf.kind not in ("ones", "zeros"), declarations, is_leaf=is_declared)


def initial_values(declarations: Any, key: jax.Array, initializer: Initializer) -> Any:
    """Draw float32 values for a tree of declarations.

    Each matrix has a key derived from its path, so values depend neither on the mesh nor on other parameters, and a
    sharded draw never holds a whole parameter on one device.
    """

    def value(path: tuple[Any, ...], leaf: Declared) -> jax.Array:
        shape = leaf.value.shape
        if leaf.kind == "ones":
            return jnp.ones(shape, jnp.float32)
        if leaf.kind in ("zeros", "zero_matrix"):
            return jnp.zeros(shape, jnp.float32)
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if leaf.kind == "uniform":
            return jax.random.uniform(leaf_key, shape, jnp.float32, -1, 1) * leaf.fan_in**-0.5
        return jax.random.normal(leaf_key, shape, jnp.float32) * initializer.deviation(leaf)

    return jax.tree_util.tree_map_with_path(value, declarations, is_leaf=is_declared)
