"""Attention and its gradients in numpy, float64, written pair by pair: what every implementation is held against."""

import numpy as np


def sees(i, j, query_segment, key_segment, prefix, causal, window):
    """Say whether the query in slot i sees the key in slot j, from the words of the rule."""
    if query_segment == 0 or query_segment != key_segment:
        return False
    return bool(prefix) or ((j <= i if causal or window is not None else True) and (window is None or i - j < window))


def visible_pairs(
    batch, length, slots, *, segment_ids=None, kv_segment_ids=None, prefix_mask=None, causal=True, window=None,
    query_start=0,
):  # fmt: skip
    """Return bool [B, T, S], pair by pair."""
    queries = np.ones((batch, length), int) if segment_ids is None else segment_ids
    keys = kv_segment_ids if kv_segment_ids is not None else queries if segment_ids is not None else None
    keys = np.ones((batch, slots), int) if keys is None else keys
    prefix = np.zeros((batch, slots), bool) if prefix_mask is None else prefix_mask
    pairs = np.ndindex(batch, length, slots)
    flat = [sees(query_start + t, s, queries[b, t], keys[b, s], prefix[b, s], causal, window) for b, t, s in pairs]
    return np.array(flat, bool).reshape(batch, length, slots)


def attention(
    q, k, v, do, dlse=0.0, *, alibi_slopes=None, query_scale=None, softmax_scale=None, soft_cap=None, query_start=0,
    **mask,
):  # fmt: skip
    """Return {"o", "lse", "dq", "dk", "dv", "dquery_scale", "pairs"}; do, dlse: the gradients of o and lse."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (batch, length, num_heads, head_dim), (slots, num_kv_heads) = q.shape, k.shape[1:3]
    mask = {name: np.asarray(x) if name.endswith(("ids", "mask")) and x is not None else x for name, x in mask.items()}
    pairs = visible_pairs(batch, length, slots, query_start=query_start, **mask)
    group = num_heads // num_kv_heads
    keys, values = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    rows = np.ones((batch, length)) if query_scale is None else np.asarray(query_scale, np.float64)
    slopes = np.zeros(num_heads) if alibi_slopes is None else np.asarray(alibi_slopes, np.float64)

    product = np.einsum("btnh,bsnh->bnts", q, keys)
    scores = product * scale * rows[:, None, :, None]
    slope_of_cap = 1.0
    if soft_cap is not None:
        capped = np.tanh(scores / soft_cap)
        scores, slope_of_cap = soft_cap * capped, 1 - capped**2
    distance = query_start + np.arange(length)[:, None] - np.arange(slots)[None]
    scores = scores - slopes[:, None, None] * np.abs(distance)
    scores = np.where(pairs[:, None], scores, -np.inf)
    seen = pairs.any(axis=-1)[:, None]
    peak = np.where(seen, scores.max(axis=-1), 0)
    weights = np.exp(scores - peak[..., None])
    total = np.where(seen, weights.sum(axis=-1), 1)
    weights /= total[..., None]
    lse = np.where(seen, peak + np.log(total), -np.inf)
    o = np.einsum("bnts,bsnh->btnh", weights, values)

    dweights = np.einsum("btnh,bsnh->bnts", do, values)
    delta = np.einsum("btnh,btnh->bnt", do, o)
    dscores = weights * (dweights - delta[..., None] + np.broadcast_to(dlse, lse.shape)[..., None]) * slope_of_cap
    dproduct = dscores * scale * rows[:, None, :, None]
    by_group = (batch, slots, num_kv_heads, group, -1)
    return {
        "o": o,
        "lse": lse,
        "dq": np.einsum("bnts,bsnh->btnh", dproduct, keys),
        "dk": np.einsum("bnts,btnh->bsnh", dproduct, q).reshape(by_group).sum(axis=3),
        "dv": np.einsum("bnts,btnh->bsnh", weights, do).reshape(by_group).sum(axis=3),
        "dquery_scale": np.einsum("bnts,bnts->bt", dscores, product * scale),
        "pairs": pairs,
    }
