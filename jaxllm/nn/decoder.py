"""The one decoder that every family is a spec of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.attention import Attention, AttentionContext, LayerCache
from jaxllm.nn.linear import project
from jaxllm.nn.masks import attention_mask
from jaxllm.nn.mlp import FeedForward
from jaxllm.nn.norm import RMSNorm
from jaxllm.nn.param import param
from jaxllm.nn.position import logn_scale, rope_tables
from jaxllm.sharding.rules import constrain
from jaxllm.spec import ModelSpec
from jaxllm.types import Batch, KVCache, ModelOutput

Remat = Literal["none", "full", "dots", "dots_with_no_batch_dims"]

REMAT_POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer, each added to the residual stream."""

    spec: ModelSpec
    return_hidden: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, LayerCache | None],
        layer: jax.Array,
        window: jax.Array | None,
        context: AttentionContext,
    ) -> tuple[tuple[jax.Array, LayerCache | None], jax.Array | None]:
        """Run one layer on (x [B, T, D], cache); the second result is x again if every layer's output is wanted."""
        x, cache = carry
        eps = self.spec.norm.eps
        normed = RMSNorm(eps, name="attention_norm")(x)
        attended, cache = Attention(self.spec.attention, name="attention")(normed, context, layer, window, cache)
        x = x + attended
        x = x + FeedForward(self.spec.mlp, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        x = constrain(x, "batch", "length", "act_embed")
        return (x, cache), x if self.return_hidden else None


class Decoder(nn.Module):
    """Token embedding, scanned blocks, final norm and output head.

    Layers that differ only in a number get it as a scanned input; layers that differ in structure would be another
    scanned group.

    Attributes:
      remat: what the backward pass recomputes, see REMAT_POLICIES.
    """

    spec: ModelSpec
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        *,
        cache: KVCache | None = None,
        train: bool = False,
        compute_dtype: jnp.dtype | None = None,
        return_hidden: bool = False,
        return_logits: bool = True,
    ) -> ModelOutput:
        """Run the model on a batch.

        Args:
          cache: past keys and values; the batch's tokens are appended at `cache.index`.
          train: position rules that are off in training are off.
          compute_dtype: dtype of activations; None: that of the parameters.
        """
        spec = self.spec
        table = param(self, "embedding", (spec.vocab_size, spec.hidden_size), ("vocab", "embed"), "embedding")
        # First as the table lies, then as activations lie: told only the second, XLA replicates the whole batch.
        x = constrain(jnp.take(table, batch.tokens, axis=0), "replicas", "length", "embed")
        x = x.astype(compute_dtype or table.dtype)
        embedded = x = constrain(x, "batch", "length", "act_embed")
        cache = None if cache is None else _append_slots(cache, batch)
        context = _attention_context(spec, batch, cache, train)
        layers = None if cache is None else LayerCache(k=cache.k, v=cache.v)

        (x, layers), outputs = self._blocks(return_hidden)(
            (x, layers), jnp.arange(spec.num_layers), _window_sizes(spec), context
        )
        x = RMSNorm(spec.norm.eps, name="final_norm")(x)
        logits = self._head(x, table) if return_logits else None
        if cache is not None:
            cache = cache.replace(k=layers.k, v=layers.v, index=cache.index + batch.tokens.shape[1])
        hidden = jnp.concatenate([embedded[None], outputs, x[None]]) if return_hidden else x
        return ModelOutput(hidden=hidden, logits=logits, cache=cache)

    def _blocks(self, return_hidden: bool) -> nn.Module:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.spec.num_layers,
            in_axes=(0, 0, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.spec, return_hidden, name="layers")

    def _head(self, x: jax.Array, table: jax.Array) -> jax.Array:
        params = {"embedding": table}
        if not self.spec.head.tie_word_embeddings:
            shape = (self.spec.hidden_size, self.spec.vocab_size)
            params["head"] = param(self, "head", shape, ("embed", "vocab"), "matrix", self.spec.hidden_size)
        return output_logits(self.spec, params, x)


def head_kernel(spec: ModelSpec, params: dict) -> jax.Array:
    """Return the output matrix [D, V] that a loss chunked over tokens multiplies hidden states with."""
    return params["embedding"].T if spec.head.tie_word_embeddings else params["head"]


def output_logits(spec: ModelSpec, params: dict, hidden: jax.Array) -> jax.Array:
    """Return float32 logits [B, T, V] of hidden states [B, T, D] after the final norm."""
    logits = project(hidden, head_kernel(spec, params), result_dtype=jnp.promote_types(hidden.dtype, jnp.float32))
    return constrain(logits, "batch", "length", "vocab")


def _append_slots(cache: KVCache, batch: Batch) -> KVCache:
    start = (0, cache.index)
    return cache.replace(
        segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, batch.segment_ids, start),
        positions=jax.lax.dynamic_update_slice(cache.positions, batch.positions, start),
    )


def _attention_context(spec: ModelSpec, batch: Batch, cache: KVCache | None, train: bool) -> AttentionContext:
    batch_size, length = batch.tokens.shape
    slots = jnp.arange(length) + (0 if cache is None else cache.index)
    key_segments = batch.segment_ids if cache is None else cache.segment_ids
    key_slots = jnp.arange(key_segments.shape[1])
    if batch.mask is None:
        mask = attention_mask(slots, key_slots, batch.segment_ids, key_segments)
    else:
        mask = batch.mask & (key_segments != 0)[:, None, :]
    rope_length = batch.rope_length
    if rope_length is None:
        rope_length = jnp.full((batch_size,), length, jnp.int32)
    cos, sin = rope_tables(spec.position, batch.positions, spec.attention.head_dim, length=rope_length, train=train)
    return AttentionContext(
        cos=cos,
        sin=sin,
        mask=mask,
        distance=None if spec.window is None else slots[:, None] - key_slots[None, :],
        query_scale=None if spec.logn is None or train else logn_scale(spec.logn, batch.positions),
        index=None if cache is None else cache.index,
    )


def _window_sizes(spec: ModelSpec) -> jax.Array | None:
    if spec.window is None:
        return None
    unlimited = jnp.iinfo(jnp.int32).max
    return jnp.array([unlimited if size is None else size for size in spec.window], jnp.int32)
