"""Keys and values trained before each layer's own (P-tuning v2, arXiv:2110.07602)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.nn.adapter import Adapter, Prefix
from jaxllm.nn.param import Declared, Kind
from jaxllm.sharding.staged import gather
from jaxllm.spec import MLA
from jaxllm.train.tuning.base import AdapterTuning
from jaxllm.types import Params

_TABLE = ("layers", "positions", "kv_heads", "head_dim")
_INNER = ("norm", "embed")
_OUTER = ("embed", "norm", "layers", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixTuning(AdapterTuning):
    """Keys and values that every query sees before all others are trained; all parameters are frozen.

    Trained are the keys and values [L, P, K, H] themselves, or with `adapter.prefix_hidden` a table [P, D] and the two
    layers of a network with tanh between them that makes keys and values of it (THUDM's PrefixEncoder with
    prefix_projection; sizes as in peft). They start as torch's Embedding and Linear.
    """

    def __post_init__(self):
        if isinstance(self.spec.attention, MLA):
            raise InputError(
                "adapter.kind: a prefix needs keys and values of each head, which latent attention does not cache; "
                "expected 'lora' or 'partial'"
            )

    def trained(self) -> Any:
        """Return the declarations of the keys and values, or of the network that makes them."""
        length, inner, width = self.config.prefix_length, self.config.prefix_hidden, self.spec.hidden_size
        attention = self.spec.attention
        heads = (attention.num_kv_heads, attention.head_dim)
        if inner is None:
            shape = (self.spec.num_layers, length, *heads)
            return {name: _declared(shape, _TABLE, "unit") for name in ("k", "v")}
        outputs = (2, self.spec.num_layers, *heads)
        return {
            "table": _declared((length, width), ("positions", "norm"), "unit"),
            "inner": {
                "kernel": _declared((width, inner), _INNER, "uniform", width),
                "bias": _declared((inner,), _INNER[1:], "uniform", width),
            },
            "outer": {
                "kernel": _declared((inner, *outputs), _OUTER, "uniform", inner),
                "bias": _declared(outputs, _OUTER[1:], "uniform", inner),
            },
        }

    def join(self, trained: Params, frozen: Params) -> tuple[Params, Adapter]:
        """Return the frozen parameters, and the keys and values by layer."""
        k, v = _keys_and_values(trained)
        adapter = {
            group.name: {"attention": {"prefix": Prefix(k[group.start : group.stop], v[group.start : group.stop])}}
            for group in self.spec.layer_groups
        }
        return frozen, adapter

    def merge(self, trained: Params, frozen: Params) -> Params:
        """Raise InputError: no weights of the model can take a prefix in."""
        del trained, frozen
        raise InputError("adapter.kind: a prefix cannot be merged into a model's weights; keep it as an adapter")

    def start(self, adapter: Adapter) -> Params:
        """Return the keys and values of a given adapter of numpy arrays.

        Raises:
          InputError: it has other shapes, or this run trains a network, which keys and values do not tell.
        """
        if self.config.prefix_hidden is not None:
            raise InputError("adapter.prefix_hidden: a saved prefix has no network; expected null, to train it on")
        parts = [adapter.get(group.name, {}).get("attention", {}).get("prefix") for group in self.spec.layer_groups]
        if not all(isinstance(part, Prefix) for part in parts):
            raise InputError("adapter: found no prefix, expected one, by adapter.kind")
        trained = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("k", "v")}
        expected = self.trained()["k"].value.shape
        if trained["k"].shape != expected:
            raise InputError(
                f"adapter: the prefix has shape {trained['k'].shape}, expected {expected} by model and "
                "adapter.prefix_length"
            )
        return trained


def _keys_and_values(trained: Params) -> tuple[jax.Array, jax.Array]:
    """Return k and v [L, P, K, H]."""
    if "table" not in trained:
        return trained["k"], trained["v"]
    inner, outer = trained["inner"], trained["outer"]
    hidden = trained["table"] @ gather(inner["kernel"], _INNER) + gather(inner["bias"], _INNER[1:])[None]
    kernel = gather(outer["kernel"], _OUTER)
    made = jnp.tensordot(jnp.tanh(hidden), kernel, axes=1) + outer["bias"][None]
    k, v = jnp.moveaxis(made, 0, 2)
    return k, v


def _declared(shape: tuple[int, ...], axes: tuple[str, ...], kind: Kind, fan_in: int = 1) -> Declared:
    return Declared(jax.ShapeDtypeStruct(shape, jnp.float32), axes, kind, fan_in)
