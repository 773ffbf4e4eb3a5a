"""What is trained beside frozen weights: low-rank products beside matrices, and keys and values before each layer's.

An adapter is the Linen variable collection "adapter": a tree of the same nesting as the parameters, with a `LowRank` at
the place of each adapted matrix and a `Prefix` as "prefix" beside an attention layer's matrices.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxllm.nn.linear import project
from jaxllm.nn.noise import Dropout, fold_rows
from jaxllm.nn.param import Kind, param
from jaxllm.nn.quantized import project_held
from jaxllm.sharding.staged import gather

Adapter = dict[str, Any]


class LowRank(flax.struct.PyTreeNode):
    """scale * (x a) b, beside a matrix (LoRA, arXiv:2106.09685 section 4.1); layers are stacked as the matrix's are.

    Attributes:
      a: [inputs..., r]. b: [r, outputs...].
      keys: uint32 [B, 2], of the dropout of x in training; None: nothing is dropped.
      scale: factor of the product. rate: share of x that it does not see, where there are keys.
      place: number that tells its dropout from others'; matrices of one published tensor drop the same.
    """

    a: jax.Array
    b: jax.Array
    keys: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    rate: float = flax.struct.field(pytree_node=False, default=0.0)
    place: int = flax.struct.field(pytree_node=False, default=0)

    def gathered(self, axes: tuple[str, ...], num_inputs: int, dtype: jnp.dtype, keep: tuple[str, ...] = ()) -> LowRank:
        """Return it whole and in `dtype`, where weights are gathered by hand; arguments as in `param`."""
        first, second = factor_axes(axes, num_inputs)
        return self.replace(
            a=gather(self.a.astype(dtype), first, keep=keep), b=gather(self.b.astype(dtype), second, keep=keep)
        )

    def dropped(self, x: jax.Array) -> jax.Array:
        """Return what of x [B, ...] the product sees."""
        return x if self.keys is None else Dropout(self.keys, self.rate)(x)

    def __call__(self, x: jax.Array, num_inputs: int = 1) -> jax.Array:
        """Return the product for x [B, T, inputs...]."""
        return project(project(self.dropped(x), self.a, num_inputs) * self.scale, self.b)

    def merged(self, kernel: jax.Array) -> jax.Array:
        """Return one layer's matrix with the product added."""
        product = jnp.tensordot(self.a, self.b, axes=1) * self.scale
        return kernel + product.astype(kernel.dtype)


def factor_axes(axes: tuple[str, ...], num_inputs: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the logical axes of the two factors beside a matrix with these axes."""
    lead = tuple(axis for axis in axes if axis in ("layers", "experts"))
    rest = axes[len(lead) :]
    return (*lead, *rest[:num_inputs], "lora"), (*lead, "lora", *rest[num_inputs:])


class Prefix(flax.struct.PyTreeNode):
    """Keys and values [P, K, H] that every query sees before all others (P-tuning v2, arXiv:2110.07602)."""

    k: jax.Array
    v: jax.Array


def adapter_of(module: nn.Module, name: str) -> Any | None:
    """Return what the adapter has for a parameter of a module, or None."""
    return module.get_variable("adapter", name)


def linear(
    module: nn.Module,
    x: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    kind: Kind,
    *,
    num_inputs: int = 1,
) -> jax.Array:
    """Declare a module's matrix "kernel" and multiply x [B, T, inputs...] with it, and with its adapter's."""
    kernel = param(module, "kernel", shape, axes, kind, math.prod(shape[:num_inputs]), dtype=x.dtype)
    y = project_held(x, kernel, num_inputs)
    low_rank = adapter_of(module, "kernel")
    return y if low_rank is None else y + low_rank.gathered(axes, num_inputs, x.dtype)(x, num_inputs)


def with_dropout(adapter: Adapter, row_keys: jax.Array) -> Adapter:
    """Return an adapter whose products drop inputs: each place of each layer has its own keys."""

    def keyed(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, LowRank) or not node.rate:
            return node
        keys = fold_rows(row_keys, node.place)
        if path[0].key.startswith("layers"):
            keys = jax.vmap(lambda layer: fold_rows(keys, layer))(jnp.arange(node.a.shape[0]))
        return node.replace(keys=keys)

    return jax.tree_util.tree_map_with_path(keyed, adapter, is_leaf=lambda node: isinstance(node, LowRank))


def adapted_paths(adapter: Adapter) -> set[str]:
    """Return the paths of the matrices that an adapter has something beside."""
    leaves = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lambda node: isinstance(node, LowRank))
    return {"/".join(key.key for key in path) for path, _ in leaves}
