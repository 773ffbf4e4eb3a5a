"""The one decoder that every family is a spec of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.adapter import Adapter, adapter_of, factor_axes
from jaxllm.nn.attention import Attention, AttentionContext, LayerCache
from jaxllm.nn.context import append_slots, attention_context, block_positions, window_sizes
from jaxllm.nn.dot_product import AttentionImpl
from jaxllm.nn.embedding import embed
from jaxllm.nn.latent_attention import LatentAttention
from jaxllm.nn.linear import project
from jaxllm.nn.mlp import FeedForward
from jaxllm.nn.moe import MixtureOfExperts, Routing
from jaxllm.nn.noise import ATTENTION, FEED_FORWARD, Dropout, embedding_dropout, layer_dropout, neftune
from jaxllm.nn.norm import Normalize
from jaxllm.nn.param import param
from jaxllm.sharding.rules import constrain
from jaxllm.sharding.staged import gather, keep_all_but_gathered, manual_axes, sum_over
from jaxllm.spec import MLA, DeepNorm, LayerGroup, LearnedBlock, ModelSpec, SandwichNorm
from jaxllm.types import Batch, KVCache, ModelOutput

Remat = Literal["none", "full", "dots", "dots_with_no_batch_dims"]

TABLE_AXES, HEAD_AXES = ("vocab", "embed"), ("embed", "vocab")

REMAT_POLICIES: dict[str, Callable] = {
    "none": keep_all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """One layer: attention, then the feed-forward layer or mixture of experts, each on the residual stream."""

    spec: ModelSpec
    moe: bool
    train: bool
    return_hidden: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, LayerCache | None],
        layer: jax.Array,
        window: jax.Array | None,
        context: AttentionContext,
        valid: jax.Array,
        never_dropped: jax.Array | None,
        dropout: Dropout | None,
    ) -> tuple[tuple[jax.Array, LayerCache | None], tuple[jax.Array | None, Routing | None]]:
        """Run one layer on (x [B, T, D], cache).

        Returns:
          ((x, cache), (x again if every layer's output is wanted, the routing of a mixture of experts)).
        """
        spec = self.spec
        x, cache = carry
        dropout = _folded(dropout, layer)
        attention = LatentAttention if isinstance(spec.attention, MLA) else Attention
        normed = Normalize(spec.norm, name="attention_norm")(x)
        attended, cache = attention(spec, name="attention")(normed, context, layer, window, cache)
        x = self._add(x, normed, attended, "attention_post_norm", _folded(dropout, ATTENTION))
        normed = Normalize(spec.norm, name="mlp_norm")(x)
        routing = None
        if self.moe:
            mixture = MixtureOfExperts(spec.moe, spec.mlp.activation, name="mlp")
            mixed, routing = mixture(normed, valid, train=self.train, never_dropped=never_dropped)
        else:
            mixed = FeedForward(spec.mlp, name="mlp")(normed)
        x = self._add(x, normed, mixed, "mlp_post_norm", _folded(dropout, FEED_FORWARD))
        x = constrain(x, "batch", "length", "act_embed")
        return (x, cache), (x if self.return_hidden else None, routing)

    def _add(
        self, x: jax.Array, normed: jax.Array, branch: jax.Array, post_norm: str, dropout: Dropout | None
    ) -> jax.Array:
        """Add a branch to the residual stream."""
        residual = self.spec.residual
        if isinstance(residual, SandwichNorm):
            branch = Normalize(self.spec.norm, name=post_norm)(branch)
        if dropout is not None:
            branch = dropout(branch)
        return (residual.alpha * normed if isinstance(residual, DeepNorm) else x) + branch


class Decoder(nn.Module):
    """Token embedding, scanned blocks, final norm and output head.

    Layers that differ only in a number get it as a scanned input; layers that differ in structure are another scanned
    group.

    Attributes:
      remat: what the backward pass recomputes, see REMAT_POLICIES; under "none" it still gathers weights again, where
        they are gathered by hand.
      attention_impl: what computes attention.
    """

    spec: ModelSpec
    remat: Remat = "none"
    attention_impl: AttentionImpl = "reference"

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
        embedding_gradient_scale: jax.Array | None = None,
        never_dropped: jax.Array | None = None,
        row_keys: jax.Array | None = None,
        dropout: float = 0.0,
        neftune_alpha: float | None = None,
    ) -> ModelOutput:
        """Run the model on a batch; arguments as in `model.apply`."""
        spec = self.spec
        shape = (spec.vocab_size, spec.hidden_size)
        table = param(self, "embedding", shape, TABLE_AXES, "embedding", keep=TABLE_AXES)
        x = self._embed(table, batch, compute_dtype or table.dtype)
        if embedding_gradient_scale is not None:
            fixed = jax.lax.stop_gradient(x)
            x = fixed + embedding_gradient_scale.astype(x.dtype) * (x - fixed)
        if neftune_alpha is not None:
            x = neftune(x, batch.segment_ids, row_keys, neftune_alpha)
        x = embedding_dropout(row_keys, dropout)(x) if dropout else x
        branches = layer_dropout(row_keys, dropout) if dropout else None
        embedded = x
        cache = None if cache is None else append_slots(cache, batch)
        context = attention_context(spec, batch, cache, train, self.attention_impl)
        layers = None if cache is None else LayerCache(k=cache.k, v=cache.v)
        windows, valid = window_sizes(spec), batch.segment_ids != 0
        hidden, routings = [embedded[None]], []
        for group in spec.layer_groups:
            window = None if windows is None else windows[group.start : group.stop]
            (x, layers), (outputs, routing) = self._blocks(group, train, return_hidden)(
                (x, layers), jnp.arange(group.start, group.stop), window, context, valid, never_dropped, branches
            )
            hidden.append(outputs)
            routings += [routing] if group.moe else []
        x = Normalize(spec.norm, name="final_norm")(x)
        logits = self._head(x, table) if return_logits else None
        if cache is not None:
            cache = cache.replace(k=layers.k, v=layers.v, index=cache.index + batch.tokens.shape[1])
        return ModelOutput(
            hidden=jnp.concatenate([*hidden, x[None]]) if return_hidden else x,
            logits=logits,
            cache=cache,
            aux=jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings) if routings else None,
        )

    def _embed(self, table: jax.Array, batch: Batch, dtype: jnp.dtype) -> jax.Array:
        x = embed(table, batch.tokens, TABLE_AXES, dtype)
        low_rank = adapter_of(self, "embedding")
        if low_rank is not None:
            first, second = factor_axes(TABLE_AXES, 1)
            rows = embed(low_rank.a, batch.tokens, first, dtype)
            x += project(rows * low_rank.scale, gather(low_rank.b.astype(dtype), second))
        if isinstance(self.spec.position, LearnedBlock):
            shape = (self.spec.position.num_positions, self.spec.hidden_size)
            for name, places in (
                ("position_embedding", batch.positions),
                ("block_position_embedding", block_positions(batch)),
            ):
                axes = ("positions", "embed")
                positions = param(self, name, shape, axes, "embedding", keep=axes)
                x += embed(positions, places, axes, dtype)
        return x

    def _blocks(self, group: LayerGroup, train: bool, return_hidden: bool) -> nn.Module:
        block = Block
        if self.remat != "none" or manual_axes():
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "adapter": 0},
            split_rngs={"params": True},
            length=len(group.layers),
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.spec, group.moe, train, return_hidden, name=group.name)

    def _head(self, x: jax.Array, table: jax.Array) -> jax.Array:
        params = {"embedding": table}
        if not self.spec.head.tie_word_embeddings:
            shape = (self.spec.hidden_size, self.spec.vocab_size)
            params["head"] = param(self, "head", shape, HEAD_AXES, "matrix", self.spec.hidden_size, keep=HEAD_AXES)
        return output_logits(self.spec, params, x, {"head": adapter_of(self, "head")})


def _folded(dropout: Dropout | None, number: int | jax.Array) -> Dropout | None:
    return None if dropout is None else dropout.folded(number)


def head_kernel(
    spec: ModelSpec, params: dict, dtype: jnp.dtype | None = None, adapter: Adapter | None = None
) -> jax.Array:
    """Return the output matrix [D, V] that hidden states are multiplied with, normalised where the spec says so.

    Args:
      adapter: what it has for the head is added.
      dtype: what the matrix is gathered in, where weights are gathered by hand; elsewhere it is the parameters' own.
    """
    kernel = params["embedding"].T if spec.head.tie_word_embeddings else params["head"]
    if spec.head.normalized:
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        squares = sum_over(jnp.sum(jnp.square(wide), axis=0, keepdims=True), "embed")
        # The square of torch's 1e-12 under the root: a zero column has no gradient to lose.
        kernel = (wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(kernel.dtype)
    kernel = gather(kernel.astype(dtype), HEAD_AXES) if manual_axes() else kernel
    low_rank = None if adapter is None else adapter.get("head")
    return kernel if low_rank is None else low_rank.gathered(HEAD_AXES, 1, kernel.dtype).merged(kernel)


def output_logits(spec: ModelSpec, params: dict, hidden: jax.Array, adapter: Adapter | None = None) -> jax.Array:
    """Return float32 logits [B, T, V] of hidden states [B, T, D] after the final norm."""
    kernel = head_kernel(spec, params, hidden.dtype)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = project(hidden, kernel, result_dtype=wide)
    low_rank = None if adapter is None else adapter.get("head")
    if low_rank is not None:
        logits += low_rank.gathered(HEAD_AXES, 1, hidden.dtype)(hidden).astype(wide)
    return constrain(logits, "batch", "length", "vocab")
