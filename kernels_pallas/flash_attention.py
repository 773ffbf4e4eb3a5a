"""Flash attention: the public function, its gradient, and the choice of the implementation.

The seam. An implementation is a module (flash_tpu, flash_gpu) with two functions over arrays as the caller laid them
out, unpadded; it pads and transposes as it likes:

    forward(q, k, v, query_scale, slopes, masks, options) -> (o, lse)
    backward(q, k, v, query_scale, slopes, o, lse, do, delta, masks, options) -> (dq, dk, dv)

    q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv]: as the caller gave them, for a factor of bfloat16 queries would
      round them once more; o, do [B, T, N, Hv] in q's dtype. dq, dk, dv in their dtypes, but see query_scale.
    query_scale: float32 [B, T] or None. Where it is given, dq is float32 and not yet multiplied by it: both gradients
      follow from that without a division.
    slopes: float32 [N] or None, ALiBi's, in base e. masks: visible.Masks. options: options.Options, static. The scores
      in base 2 are r = options.factor * query_scale * q k^T, or soft_cap * LOG2_E * tanh(r).
    lse: float32 [B, N, T] in base e, NOTHING_SEEN (visible.py) for a query that sees nothing.
    delta: float32 [B, N, T], the rows' sums of do * o (less the gradient of lse).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas import reference
from kernels_pallas.options import BlockSizes, Options
from kernels_pallas.platform import implementation
from kernels_pallas.visible import Masks


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
    window: int | jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    query_start: int | jax.Array = 0,
    impl: str | None = None,
    interpret: bool = False,
    block_sizes: BlockSizes | tuple[int, int] | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return softmax(scores) v without ever storing the scores: [B, T, N, Hv] in q's dtype (arXiv:2307.08691).

    The query in row t has slot i = query_start + t and sees the key in slot j where both are of the same segment and
    j <= i (if `causal`) and 0 <= i - j < window (if given), or prefix_mask[j]. Tiles of scores in which no query sees a
    key are neither computed nor read. Scores, softmax and sums are float32. Queries that see nothing give zeros, and
    zero gradients. Differentiable in q, k, v, query_scale, and through the log-sum-exp; saves q, k, v, o, lse.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H], N a multiple of K. v: [B, S, K, Hv]. All of one dtype, float32 or bfloat16 (the
        reference also takes other floats).
      segment_ids: int [B, T], of the queries, and of the keys unless kv_segment_ids, int [B, S], is given; 0 = padding.
        None: all are of one segment.
      prefix_mask: bool [B, S]: keys that every query of their segment sees.
      window: int or int32 scalar. It is data: one compiled kernel serves all sizes.
      alibi_slopes: float32 [N], a constant: adds -slope * |i - j| (arXiv:2108.12409).
      query_scale: float32 [B, T], times the scores (LogN). softmax_scale: None: H**-0.5.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap), before ALiBi (arXiv:2408.00118).
      query_start: int or int32 scalar.
      impl: "tpu", "gpu", "reference"; None: by the default device. interpret: run the TPU or GPU kernel on a CPU.
      block_sizes: of the tiles, one (queries, keys) for all kernels or BlockSizes; None: by device and head dim.
      return_lse: also return the log-sum-exp of the scores, float32 [B, N, T]; NOTHING_SEEN where nothing is seen.

    Raises:
      ValueError: an argument that does not fit the others; the message names it, what was found and expected.
    """
    _check(q, k, v, segment_ids, kv_segment_ids, prefix_mask, alibi_slopes, query_scale)
    _check_scalars(window, query_start, soft_cap, block_sizes)
    impl = implementation(impl, interpret)
    if impl == "reference":
        return reference.flash_attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            prefix_mask=prefix_mask,
            window=window,
            alibi_slopes=alibi_slopes,
            query_scale=query_scale,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
            causal=causal,
            query_start=query_start,
            return_lse=return_lse,
        )
    _check_dtypes(q, k, v)
    if segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = segment_ids
    masks = Masks(*map(_int32, (segment_ids, kv_segment_ids, prefix_mask, window, query_start)))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if isinstance(block_sizes, tuple):
        block_sizes = BlockSizes(block_sizes, block_sizes, block_sizes)
    options = Options(float(scale), causal, soft_cap, block_sizes, interpret)
    query_scale = None if query_scale is None else query_scale.astype(jnp.float32)
    # A platform's part of Pallas is loaded only where it is used.
    kernels = importlib.import_module(f"kernels_pallas.flash_{impl}")
    o, lse = _attend(kernels, options, q, k, v, query_scale, alibi_slopes, masks)
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    kernels: ModuleType,
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_scale: jax.Array | None,
    slopes: jax.Array | None,
    masks: Masks,
) -> tuple[jax.Array, jax.Array]:
    return kernels.forward(q, k, v, query_scale, slopes, masks, options)


def _attend_forward(kernels, options, q, k, v, query_scale, slopes, masks):
    o, lse = _attend(kernels, options, q, k, v, query_scale, slopes, masks)
    return (o, lse), (q, k, v, query_scale, slopes, masks, o, lse)


def _attend_backward(kernels, options, saved, gradients):
    q, k, v, query_scale, slopes, masks, o, lse = saved
    do, dlse = gradients
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2) - dlse
    dq, dk, dv = kernels.backward(q, k, v, query_scale, slopes, o, lse, do, delta, masks, options)
    if query_scale is None:
        return dq, dk, dv, None, None, None
    dquery_scale = jnp.sum(dq * q.astype(jnp.float32), axis=(2, 3))
    dq = (dq * query_scale[:, :, None, None]).astype(q.dtype)
    return dq, dk, dv, dquery_scale, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _int32(x: jax.Array | int | None) -> jax.Array | None:
    return None if x is None else jnp.asarray(x).astype(jnp.int32)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    prefix_mask: jax.Array | None,
    alibi_slopes: jax.Array | None,
    query_scale: jax.Array | None,
) -> None:
    """Raise ValueError where the arrays do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: found shape {x.shape}, expected 4 axes: row, slot, head, head_dim")
    (batch, length, num_heads, head_dim), (slots, num_kv_heads) = q.shape, k.shape[1:3]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"q: found {num_heads} heads, expected a multiple of k's {num_kv_heads}")
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("kv_segment_ids: found without segment_ids, expected both")
    expected = {
        "k": (k, (batch, slots, num_kv_heads, head_dim)),
        "v": (v, (batch, slots, num_kv_heads, v.shape[-1])),
        "segment_ids": (segment_ids, (batch, length)),
        "kv_segment_ids": (segment_ids if kv_segment_ids is None else kv_segment_ids, (batch, slots)),
        "prefix_mask": (prefix_mask, (batch, slots)),
        "alibi_slopes": (alibi_slopes, (num_heads,)),
        "query_scale": (query_scale, (batch, length)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: found shape {x.shape}, expected {shape}")
        if x is not None and name.endswith("ids") and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name}: found dtype {x.dtype}, expected integers")


def _check_scalars(window: object, query_start: object, soft_cap: float | None, block_sizes: object) -> None:
    """Raise ValueError where an argument cannot be what it should."""
    for name, x in (("window", window), ("query_start", query_start)):
        if x is not None and (jnp.shape(x) != () or not jnp.issubdtype(jnp.result_type(x), jnp.integer)):
            raise ValueError(f"{name}: found {x!r}, expected an integer or an int32 scalar")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap: found {soft_cap}, expected a positive number or None")
    pair = isinstance(block_sizes, tuple) and len(block_sizes) == 2
    if not pair and not isinstance(block_sizes, BlockSizes | None):
        raise ValueError(f"block_sizes: found {block_sizes!r}, expected (queries, keys), BlockSizes or None")


def _check_dtypes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raise ValueError where the kernels cannot take the arrays."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f'q: found dtype {q.dtype}, expected float32 or bfloat16 (impl="reference" takes others)')
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: found dtype {x.dtype}, expected q's, {q.dtype}")
    if q.size == 0 or k.size == 0 or v.size == 0:
        raise ValueError(f"found empty arrays, q {q.shape}, k {k.shape}, v {v.shape}; expected at least one element")
