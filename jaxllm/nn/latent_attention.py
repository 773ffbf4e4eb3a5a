"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.attention import AttentionContext, LayerCache, OutputProjection, Projection
from jaxllm.nn.dot_product import attend, attend_newest
from jaxllm.nn.mlp import Matrix
from jaxllm.nn.norm import Normalize
from jaxllm.nn.param import param
from jaxllm.nn.position import apply_rope, yarn_mscale
from jaxllm.sharding.rules import constrain
from jaxllm.spec import MLA, ModelSpec, Norm, Yarn

# The released code gives its inner norms no eps, so they have its class's default whatever rms_norm_eps says.
LATENT_NORM = Norm(eps=1e-6)


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
            q_nope = jnp.einsum("BTNH,CNH->BTNC", q_nope, expand_keys)
            y = self._attend_absorbed(q_nope, q_rope, cache, context, layer, window, scale)
            y = jnp.einsum("BTNC,CNH->BTNH", y, expand_values)
        else:
            if cache is not None:
                latent, k_rope = (part.astype(x.dtype) for part in cache.layer(layer))
            k_nope = jnp.einsum("BSC,CNH->BSNH", latent[:, :, 0], expand_keys)
            values = jnp.einsum("BSC,CNH->BSNH", latent[:, :, 0], expand_values)
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

    def _expansion(self, name: str, head_dim: int, dtype: jnp.dtype) -> jax.Array:
        spec: MLA = self.spec.attention
        shape = (spec.kv_lora_rank, spec.num_heads, head_dim)
        return param(self, name, shape, ("latent", "heads", "head_dim"), "matrix", spec.kv_lora_rank, dtype=dtype)


def softmax_scale(spec: ModelSpec) -> float:
    """Return what scores are multiplied with: 1 / sqrt(width of a query), times YaRN's squared temperature."""
    attention, scaling = spec.attention, spec.position.scaling
    scale = (attention.qk_nope_head_dim + attention.qk_rope_head_dim) ** -0.5
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale
