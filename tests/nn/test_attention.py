"""Scaled dot-product attention against a plain loop over heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.nn.dot_product import dot_product_attention

attend = jax.jit(dot_product_attention)


def expected_attention(q, k, v, mask, scale):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for row, query, head in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(mask[row, query])
        if keys.size == 0:
            continue
        scores = k[row, keys, head // group] @ q[row, query, head] / np.sqrt(q.shape[-1]) * scale[row, query]
        weights = np.exp(scores - scores.max())
        out[row, query, head] = weights / weights.sum() @ v[row, keys, head // group]
    return out


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 6, 4), (2, 7, 3, 4), (2, 7, 3, 4)])
    mask = rng.random((2, 5, 7)) < 0.5
    mask[0, 2] = mask[1, 0] = False
    return q, k, v, mask, rng.uniform(1, 2, (2, 5)).astype(np.float32)


def test_grouped_heads_masks_and_query_scale(case):
    q, k, v, mask, scale = case
    np.testing.assert_allclose(attend(q, k, v, mask, query_scale=scale), expected_attention(*case), atol=1e-5)
    np.testing.assert_allclose(attend(q, k, v, mask), expected_attention(q, k, v, mask, np.ones((2, 5))), atol=1e-5)


def test_rows_that_see_nothing_give_zeros_and_no_gradient(case):
    q, k, v, mask, _ = case
    blind = ~mask.any(axis=-1)
    assert blind.sum() == 2
    assert (np.asarray(attend(q, k, v, mask))[blind] == 0).all()
    gradients = jax.jit(jax.grad(lambda q, k, v: jnp.sum(jnp.sin(dot_product_attention(q, k, v, mask))), (0, 1, 2)))
    of_q, of_k, of_v = gradients(q, k, v)
    assert all(np.isfinite(gradient).all() for gradient in (of_q, of_k, of_v))
    assert (np.asarray(of_q)[blind] == 0).all()
    unseen = ~mask.any(axis=1)
    assert (np.asarray(of_v)[unseen] == 0).all()


def test_bfloat16_inputs_have_float32_scores():
    # 256 + 0.5 is not a bfloat16 number: scores rounded to bfloat16 could not tell the two keys apart.
    q = jnp.array([16.0, 1.0], jnp.bfloat16).reshape(1, 1, 1, 2)
    k = jnp.array([[16.0, 0.0], [16.0, 0.5]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.array([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    seen = attend(q, k, v, np.ones((1, 1, 2), bool))
    assert seen.dtype == jnp.bfloat16
    weight = 1 / (1 + np.exp(-0.5 / np.sqrt(2)))
    assert abs(float(seen[0, 0, 0, 0]) - weight) < 0.005
