"""Attention of queries to keys and values: by our kernels, or by plain operations."""

from __future__ import annotations

import functools
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxllm.nn.adapter import Prefix
from jaxllm.nn.masks import attention_mask
from jaxllm.sharding.rules import constrain
from jaxllm.sharding.staged import on_each_device
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.platform import implementation

AttentionImpl = Literal["reference", "pallas"]


def default_impl(dtype: jnp.dtype) -> AttentionImpl:
    """Return "pallas" for float32 and bfloat16 where the default device is a TPU or GPU, else "reference"."""
    served = dtype in (jnp.float32, jnp.bfloat16) and implementation(None) != "reference"
    return "pallas" if served else "reference"


class Visibility(flax.struct.PyTreeNode):
    """Who may attend to whom in one call, before any window.

    Attributes:
      segment_ids: int32 [B, T], of the queries; key_segment_ids: int32 [B, S]. 0 is padding.
      start: int32 [], the slot of the first query.
      prefix: bool [B, S], keys that all queries of their document see, whatever the order and the window; or None.
      mask: bool [B, T, S], given instead of all the others; or None.
    """

    segment_ids: jax.Array
    key_segment_ids: jax.Array
    start: jax.Array
    prefix: jax.Array | None
    mask: jax.Array | None

    def distance(self) -> jax.Array:
        """Return int32 [T, S], query slot less key slot."""
        slots = self.start + jnp.arange(self.segment_ids.shape[1])
        return slots[:, None] - jnp.arange(self.key_segment_ids.shape[1])[None, :]

    def dense(self, window: jax.Array | None) -> jax.Array:
        """Return the mask bool [B, T, S] of queries that see `window` slots back (None: all)."""
        if self.mask is not None:
            return self.mask if window is None else self.mask & (self.distance() < window)[None]
        return attention_mask(self.distance(), self.segment_ids, self.key_segment_ids, self.prefix, window)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    visibility: Visibility,
    *,
    impl: AttentionImpl,
    window: jax.Array | None = None,
    scale: float | None = None,
    query_scale: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Return softmax(scale q k^T) v for the keys that each query sees, [B, T, N, Hv] in query's dtype.

    Args:
      query: [B, T, N, H], key: [B, S, K, H], value: [B, S, K, Hv], with N a multiple of K.
      impl: "pallas": never holds [T, S] scores, except where a whole mask was given; on a CPU kernels are interpreted.
      window, scale, query_scale, alibi_slopes: as in `kernels_pallas.flash_attention`.
      prefix: further keys and values, which all queries see from no distance, whatever the window.
    """
    before = () if prefix is None else _repeated(prefix, query)
    if impl == "reference" or visibility.mask is not None:
        plain = functools.partial(
            dot_product_attention, query, scale=scale, query_scale=query_scale, return_lse=prefix is not None
        )
        distance = None if alibi_slopes is None else visibility.distance()
        own = plain(key, value, visibility.dense(window), alibi_slopes=alibi_slopes, distance=distance)
        if prefix is None:
            return own
        return _joined(own, plain(*before, jnp.ones((*query.shape[:2], before[0].shape[1]), bool)))
    optional = {
        "prefix_mask": (visibility.prefix, ("batch", None)),
        "window": (window, ()),
        "query_scale": (query_scale, ("batch", None)),
        "alibi_slopes": (alibi_slopes, ("act_heads",)),
    }
    given = {name: entry for name, entry in optional.items() if entry[0] is not None}

    def kernel(q, k, v, segments, key_segments, start, *rest):
        options, before = dict(zip(given, rest, strict=False)), rest[len(given) :]
        run = functools.partial(
            flash_attention, q, softmax_scale=scale, interpret=_interpreted(), return_lse=bool(before)
        )
        own = run(k, v, segment_ids=segments, kv_segment_ids=key_segments, query_start=start, **options)
        if not before:
            return own
        return _joined(own, run(*before, causal=False, query_scale=options.get("query_scale")))

    heads = ("batch", None, "act_heads", None)
    in_axes = (heads, heads, heads, ("batch", None), ("batch", None), (), *(axes for _, axes in given.values()))
    arrays = (query, key, value, visibility.segment_ids, visibility.key_segment_ids, visibility.start)
    run = on_each_device(kernel, (*in_axes, *(heads for _ in before)), heads)
    return run(*arrays, *(array for array, _ in given.values()), *before)


def _repeated(prefix: Prefix, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a prefix's keys and values for each row, [B, P, K, H] in query's dtype."""
    repeated = (jnp.broadcast_to(part[None], (query.shape[0], *part.shape)) for part in (prefix.k, prefix.v))
    return tuple(constrain(part.astype(query.dtype), "batch", None, "act_heads", None) for part in repeated)


def _joined(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return attention to two sets of keys from that to each, with its log-sum-exp float32 [B, N, T]."""
    (y, lse), (other, other_lse) = first, second
    share = jnp.swapaxes(jax.nn.sigmoid(lse - other_lse), 1, 2)[..., None]
    return (y * share + other * (1 - share)).astype(y.dtype)


def attend_newest(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    visibility: Visibility,
    *,
    window: jax.Array | None = None,
    scale: float | None = None,
    query_scale: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    query_rope: jax.Array | None = None,
    key_rope: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Attend with one query per row, [B, 1, N, H], to a cache; arguments as in `kernels_pallas.decode_attention`."""
    lengths = jnp.broadcast_to(visibility.start + 1, query.shape[:1])
    heads = ("batch", "act_heads", None)
    # A single head, as of latents, is read by all query heads.
    lead = () if layer is None else ("layers",)
    cache = (*lead, "batch", None, None if key.shape[-2] == 1 else "act_heads", None)
    optional = {
        "v_cache": (value, cache),
        "window": (window, ()),
        "alibi_slopes": (alibi_slopes, ("act_heads",)),
        "query_scale": (None if query_scale is None else query_scale[:, 0], ("batch",)),
        "query_rope": (None if query_rope is None else query_rope[:, 0], heads),
        "key_rope": (key_rope, cache),
        "layer": (layer, ()),
    }
    given = {name: entry for name, entry in optional.items() if entry[0] is not None}

    def kernel(q: jax.Array, k: jax.Array, lengths: jax.Array, segments: jax.Array, *rest: jax.Array) -> jax.Array:
        options = {"v_cache": None} | dict(zip(given, rest, strict=True))
        return decode_attention(
            q,
            k,
            lengths=lengths,
            segment_ids=segments,
            softmax_scale=scale,
            impl="tpu" if _interpreted() else None,
            interpret=_interpreted(),
            **options,
        )

    in_axes = (heads, cache, ("batch",), ("batch", None), *(axes for _, axes in given.values()))
    arrays = (query[:, 0], key, lengths, visibility.key_segment_ids, *(array for array, _ in given.values()))
    return on_each_device(kernel, in_axes, heads)(*arrays)[:, None]


def _interpreted() -> bool:
    return implementation(None) == "reference"


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    query_scale: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    distance: jax.Array | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return softmax(scale q k^T) v with grouped key/value heads (arXiv:1706.03762 eq. 1, arXiv:2305.13245).

    Args:
      query: [B, T, N, H], key: [B, S, K, H], value: [B, S, K, Hv], with N a multiple of K.
      mask: bool [B, T, S], True = may attend. Rows that may attend to nothing give zeros.
      scale: None: 1 / sqrt(H).
      query_scale: float32 [B, T], multiplies the scores (LogN).
      alibi_slopes: float32 [N]: each head adds -slope * |distance|; distance: int32 [T, S], query less key slot.
      return_lse: also return the log-sum-exp of the scores, float32 [B, N, T]; hugely negative where nothing is seen.

    Returns:
      [B, T, N, Hv] in query's dtype; scores and softmax are float32.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, slots = key.shape[2], key.shape[1]
    groups = num_heads // num_kv_heads
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # The queries of a group lie side by side in one axis Q = G * T: as an axis of its own, G costs copies on CPU.
    grouped = query.reshape(batch, length, num_kv_heads, groups, head_dim)
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, groups * length, head_dim)
    scores = jnp.einsum("BKQH,BSKH->BKQS", grouped, key, preferred_element_type=wide)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    scores = scores.reshape(batch, num_kv_heads, groups, length, slots)
    if query_scale is not None:
        scores = scores * query_scale[:, None, None, :, None]
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(wide).reshape(1, num_kv_heads, groups, 1, 1)
        scores -= slopes * jnp.abs(distance).astype(wide)[None, None, None]
    # Added, not selected: the backward pass then needs no mask.
    scores += jnp.where(mask, 0, 0.7 * jnp.finfo(wide).min).astype(wide)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, groups * length, slots)
    attended = jnp.einsum("BKQS,BSKH->BKQH", weights, value)
    attended = attended.reshape(batch, num_kv_heads, groups, length, value.shape[-1])
    attended = jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(batch, length, num_heads, value.shape[-1])
    attended = jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], attended, 0)
    if not return_lse:
        return attended
    return attended, jax.nn.logsumexp(scores, axis=-1).reshape(batch, num_heads, length)
