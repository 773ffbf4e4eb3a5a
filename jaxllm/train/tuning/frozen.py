"""How the frozen weights of a tuned model are held."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxllm.nn.param import Declared, is_declared
from jaxllm.nn.quantized import Quantized, quantize
from jaxllm.train.tuning.targets import num_inputs, num_stacked
from jaxllm.types import Params

Base = Literal["float32", "bfloat16", "int8", "nf4"]


def held_declarations(declarations: Any, base: Base, float32: Collection[str] = ()) -> Any:
    """Return the declarations of frozen parameters as they are held.

    The matrices of layers are held as `base`; the output matrix as bfloat16, unless `base` is float32; everything
    else as float32: embeddings, norms, biases, routers.

    Args:
      float32: "/"-separated paths of matrices that stay float32 too.
    """

    def held(leaf: Declared, base: Base) -> Any:
        shape = jax.eval_shape(lambda value: _held(value, leaf, base), leaf.value)
        if not isinstance(shape, Quantized):
            return leaf.replace(value=shape)
        axes_of_scales = shape.axes_of_scales(leaf.axes)
        return shape.replace(
            codes=leaf.replace(value=shape.codes), scales=leaf.replace(value=shape.scales, axes=axes_of_scales)
        )

    return _map(lambda leaf, _, base: held(leaf, base), declarations, None, base, float32)


def hold(params: Params, declarations: Any, base: Base, float32: Collection[str] = ()) -> Params:
    """Return float32 parameters as `held_declarations` says they are held."""
    return _map(lambda leaf, value, base: _held(value, leaf, base), declarations, params, base, float32)


def _map(
    function: Callable[[Declared, Any, Base], Any],
    declarations: Any,
    params: Params | None,
    base: Base,
    float32: Collection[str],
) -> Any:
    def each(path: tuple[Any, ...], leaf: Declared, value: Any = None) -> Any:
        name = "/".join(key.key for key in path)
        return function(leaf, value, "float32" if name in float32 else _base_of(name, leaf, base))

    rest = () if params is None else (params,)
    return jax.tree_util.tree_map_with_path(each, declarations, *rest, is_leaf=is_declared)


def _base_of(path: str, leaf: Declared, base: Base) -> Base:
    if leaf.kind not in ("matrix", "output") or path.endswith("router/kernel") or base == "float32":
        return "float32"
    return base if path.startswith("layers") else "bfloat16"


def _held(value: jax.Array, leaf: Declared, base: Base) -> jax.Array | Quantized:
    if base in ("float32", "bfloat16"):
        return value.astype(jnp.dtype(base))
    first = num_stacked(leaf) - len(leaf.axes)
    return quantize(value, tuple(range(first, first + num_inputs(leaf))), base)
