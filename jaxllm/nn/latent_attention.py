"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.adapter import LowRank, adapter_of
from jaxllm.nn.attention import AttentionContext, LayerCache, OutputProjection, Projection
from jaxllm.nn.dot_product import attend, attend_newest
from jaxllm.nn.mlp import Matrix
from jaxllm.nn.norm import Normalize
from jaxllm.nn.param import param
from jaxllm.nn.position import apply_rope, yarn_mscale
from jaxllm.nn.quantized import Weight, multiply
from jaxllm.sharding.rules import constrain
from jaxllm.spec import MLA, ModelSpec, Norm, Yarn

# The released code gives its inner norms no eps, so they have its class's default whatever rms_norm_eps says.
LATENT_NORM = Norm(eps=1e-6)


class Expansion(NamedTuple):
    """A matrix [C, N, H] from latents to the keys or values of heads, and what an adapter has beside it."""

    kernel: Weight
    low_rank: LowRank | None

    def __call__(self, latent: jax.Array) -> jax.Array:
        """Expand latents [B, S, C] to [B, S, N, H]."""
        return self._sum("BSC,CNH->BSNH", latent, lambda low_rank: low_rank(latent))

    def transposed(self, query: jax.Array) -> jax.Array:
        """Return what meets latents as the queries [B, T, N, H] meet the keys: [B, T, N, C]."""
        return self._sum(
            "BTNH,CNH->BTNC",
            query,
            lambda low_rank: jnp.einsum("BTNH,rNH,Cr->BTNC", query, low_rank.b, low_rank.a) * low_rank.scale,
        )

    def each_head(self, y: jax.Array) -> jax.Array:
        """Expand the mixed latents of each head, [B, T, N, C], to its values [B, T, N, H]."""
        return self._sum(
            "BTNC,CNH->BTNH",
            y,
            lambda low_rank: jnp.einsum("BTNC,Cr,rNH->BTNH", y, low_rank.a, low_rank.b) * low_rank.scale,
        )

    def _sum(self, product: str, x: jax.Array, added: Callable[[LowRank], jax.Array]) -> jax.Array:
        y = multiply(lambda kernel, x: jnp.einsum(product, x, kernel), self.kernel, x)
        return y if self.low_rank is None else y + added(self.low_rank)


class LatentAttention(nn.Module):
    """Attention whose keys and values are read from a latent [B, T, C] and one rotary key [B, T, R] for all heads.

    Only those two are cached. A single new token attends in the latent space itself: the matrices that would expand
    the latents of the whole cache are multiplied into its query and its output instead (the paper's appendix on
    "absorbed" matrices).
    """

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
        """Attend from x [B, T, D]; arguments as in `attention.Attention`."""
        spec: MLA = self.spec.attention
        q_nope, q_rope = self._queries(x, context)
        latent = Matrix((x.shape[-1], spec.kv_lora_rank), ("embed", "lora"), "matrix", spec.bias, name="kv_a")(x)
        latent = Normalize(LATENT_NORM, name="kv_norm")(latent)[:, :, None]
        k_rope = Matrix((x.shape[-1], spec.qk_rope_head_dim), ("embed", "head_dim"), "matrix", spec.bias, name="k_rope")
        k_rope = apply_rope(k_rope(x)[:, :, None], context.rope)
        if cache is not None:
            cache = cache.append(layer, context.index, latent, k_rope)
        expand_keys = self._expansion("k_b", spec.qk_nope_head_dim, x.dtype)
        expand_values = self._expansion("v_b", spec.v_head_dim, x.dtype)
        scale = softmax_scale(self.spec)
        if cache is not None and x.shape[1] == 1:
            q_nope = expand_keys.transposed(q_nope)
            y = self._attend_absorbed(q_nope, q_rope, cache, context, layer, window, scale)
            y = expand_values.each_head(y)
        else:
            if cache is not None:
                latent, k_rope = (part.astype(x.dtype) for part in cache.layer(layer))
            k_nope, values = expand_keys(latent[:, :, 0]), expand_values(latent[:, :, 0])
            k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
            query, key = jnp.concatenate([q_nope, q_rope], axis=-1), jnp.concatenate([k_nope, k_rope], axis=-1)
            y = attend(query, key, values, context.visibility, impl=context.impl, window=window, scale=scale)
        y = constrain(y, "batch", "length", "act_heads", None)
        return OutputProjection(x.shape[-1], spec.bias, name="o")(y), cache

    def _attend_absorbed(
        self,
        q_latent: jax.Array,
        q_rope: jax.Array,
        cache: LayerCache,
        context: AttentionContext,
        layer: jax.Array,
        window: jax.Array | None,
        scale: float,
    ) -> jax.Array:
        """Attend from one token per row, q_latent [B, 1, N, C] and q_rope [B, 1, N, R], to the latents themselves."""
        options = dict(window=window, scale=scale)
        if context.is_decoding:
            rope = dict(query_rope=q_rope, key_rope=cache.v, layer=layer)
            return attend_newest(q_latent, cache.k, None, context.visibility, **rope, **options)
        latent, k_rope = (part.astype(q_latent.dtype) for part in cache.layer(layer))
        query, key = jnp.concatenate([q_latent, q_rope], axis=-1), jnp.concatenate([latent, k_rope], axis=-1)
        return attend(query, key, latent, context.visibility, impl=context.impl, **options)

    def _queries(self, x: jax.Array, context: AttentionContext) -> tuple[jax.Array, jax.Array]:
        spec: MLA = self.spec.attention
        head_dim, input_axis = spec.qk_nope_head_dim + spec.qk_rope_head_dim, "embed"
        if spec.q_lora_rank is not None:
            x = Matrix((x.shape[-1], spec.q_lora_rank), ("embed", "lora"), "matrix", spec.bias, name="q_a")(x)
            x, input_axis = Normalize(LATENT_NORM, name="q_norm")(x), "latent"
        q = Projection(spec.num_heads, head_dim, "heads", False, input_axis, name="q")(x)
        q = constrain(q, "batch", "length", "act_heads", None)
        q_nope, q_rope = jnp.split(q, [spec.qk_nope_head_dim], axis=-1)
        return q_nope, apply_rope(q_rope, context.rope)

    def _expansion(self, name: str, head_dim: int, dtype: jnp.dtype) -> Expansion:
        spec: MLA = self.spec.attention
        shape, axes = (spec.kv_lora_rank, spec.num_heads, head_dim), ("latent", "heads", "head_dim")
        kernel = param(self, name, shape, axes, "matrix", spec.kv_lora_rank, dtype=dtype)
        low_rank = adapter_of(self, name)
        return Expansion(kernel, None if low_rank is None else low_rank.gathered(axes, 1, dtype))


def softmax_scale(spec: ModelSpec) -> float:
    """Return what scores are multiplied with: 1 / sqrt(width of a query), times YaRN's squared temperature."""
    attention, scaling = spec.attention, spec.position.scaling
    scale = (attention.qk_nope_head_dim + attention.qk_rope_head_dim) ** -0.5
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale
