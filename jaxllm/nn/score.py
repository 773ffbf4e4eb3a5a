"""The scalar head of reward models and value models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.nn.param import Declared
from jaxllm.spec import ModelSpec
from jaxllm.types import Params


def declarations(spec: ModelSpec) -> Any:
    """Return the declarations of the head of a model, {"kernel": [D]}, which every device holds whole.

    It starts normal with deviation (D + 1)^-1/2, as the reward models of arXiv:2009.01325 (appendix B.1).
    """
    value = jax.ShapeDtypeStruct((spec.hidden_size,), jnp.float32)
    return {"kernel": Declared(value, ("norm",), "score", spec.hidden_size)}


def evaluate(score: Params, hidden: jax.Array) -> jax.Array:
    """Return the head's value at every slot of hidden states [B, T, D], in promote_types(input, float32), [B, T]."""
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return jnp.sum(wide * score["kernel"].astype(wide.dtype)[None, None], axis=-1)
