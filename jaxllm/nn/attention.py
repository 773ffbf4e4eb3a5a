"""Attention layers."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax

from jaxllm.nn.adapter import adapter_of, linear
from jaxllm.nn.dot_product import AttentionImpl, Visibility, attend, attend_newest
from jaxllm.nn.param import param
from jaxllm.nn.position import RopeTables, apply_rope
from jaxllm.sharding.rules import constrain
from jaxllm.spec import GQA, ModelSpec


class AttentionContext(flax.struct.PyTreeNode):
    """What all layers of one call share.

    Attributes:
      rope: rotations of the new tokens; None without rotary positions.
      key_rope: rotations of all cached keys, where they are cached unrotated; else None.
      visibility: who may attend to whom before any window.
      alibi_slopes: float32 [N], or None.
      query_scale: float32 [B, T], LogN; or None.
      index: int32 [], the cache slot of the first token; None without a cache.
      impl: what computes attention.
    """

    rope: RopeTables | None
    key_rope: RopeTables | None
    visibility: Visibility
    alibi_slopes: jax.Array | None
    query_scale: jax.Array | None
    index: jax.Array | None
    impl: AttentionImpl = flax.struct.field(pytree_node=False, default="reference")

    @property
    def is_decoding(self) -> bool:
        """Whether the kernel for one new token per row serves this call."""
        visibility = self.visibility
        one = self.index is not None and visibility.segment_ids.shape[1] == 1
        return one and self.impl == "pallas" and visibility.mask is None


class LayerCache(flax.struct.PyTreeNode):
    """What a KVCache holds of all layers, [L, B, S, ...], updated in place as layers run."""

    k: jax.Array
    v: jax.Array

    def append(self, layer: jax.Array, index: jax.Array, k: jax.Array, v: jax.Array) -> LayerCache:
        """Write new keys and values [B, T, K, H] of one layer at slot `index`."""
        start = (layer, 0, index, 0, 0)
        return LayerCache(
            k=jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start),
            v=jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start),
        )

    def layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return one layer's keys and values [B, S, K, H]."""
        return (
            jax.lax.dynamic_index_in_dim(self.k, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.v, layer, keepdims=False),
        )


class Projection(nn.Module):
    """A matrix from the hidden (or a latent) dimension to heads, [D, N, H], with an optional bias."""

    num_heads: int
    head_dim: int
    head_axis: str
    bias: bool
    input_axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        shape, axes = (width, self.num_heads, self.head_dim), (self.input_axis, self.head_axis, "head_dim")
        y = linear(self, x, shape, axes, "matrix")
        if self.bias:
            bias = param(self, "bias", (self.num_heads, self.head_dim), (self.head_axis, "head_dim"), "zeros")
            y += bias.astype(x.dtype)[None, None]
        return y


class OutputProjection(nn.Module):
    """A matrix from heads back to the hidden dimension, [N, H, D], with an optional bias."""

    width: int
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_heads, head_dim = x.shape[-2:]
        shape = (num_heads, head_dim, self.width)
        y = linear(self, x, shape, ("heads", "head_dim", "embed"), "output", num_inputs=2)
        if self.bias:
            y += param(self, "bias", (self.width,), ("norm",), "zeros").astype(x.dtype)[None, None]
        return y


class Attention(nn.Module):
    """Grouped-query attention."""

    spec: ModelSpec

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: AttentionContext,
        layer: jax.Array,
        window: jax.Array | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend from x [B, T, D]; `window` int32 [] limits the distance, `layer` int32 [] picks the cache's row."""
        spec: GQA = self.spec.attention
        q = Projection(spec.num_heads, spec.head_dim, "heads", spec.qkv_bias, name="q")(x)
        k = Projection(spec.num_kv_heads, spec.head_dim, "kv_heads", spec.qkv_bias, name="k")(x)
        v = Projection(spec.num_kv_heads, spec.head_dim, "kv_heads", spec.qkv_bias, name="v")(x)
        q = constrain(q, "batch", "length", "act_heads", None)
        k = constrain(k, "batch", "length", "act_heads", None)
        if context.rope is not None:
            q = apply_rope(q, context.rope)
            k = k if context.key_rope is not None else apply_rope(k, context.rope)
        if cache is not None:
            cache = cache.append(layer, context.index, k, v)
        options = dict(window=window, query_scale=context.query_scale, alibi_slopes=context.alibi_slopes)
        prefix = adapter_of(self, "prefix")
        if context.is_decoding and context.key_rope is None and prefix is None:
            y = attend_newest(q, cache.k, cache.v, context.visibility, layer=layer, **options)
        else:
            if cache is not None:
                k, v = cache.layer(layer)
            if context.key_rope is not None:
                k = apply_rope(k, context.key_rope)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
            y = attend(q, k, v, context.visibility, impl=context.impl, prefix=prefix, **options)
        y = constrain(y, "batch", "length", "act_heads", None)
        return OutputProjection(x.shape[-1], spec.out_bias, name="o")(y), cache
