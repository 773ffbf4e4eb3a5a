"""Low-rank products against peft, and prefixes against the same keys given outright."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.nn.adapter import LowRank, Prefix
from jaxllm.nn.dot_product import Visibility, attend
from jaxllm.nn.mlp import Matrix

CASES = ("chatglm_r8_a32", "qwen_like_r64_a16", "baichuan2_r1_a32", "rslora_r8_a32")
MATRICES = ("query_key_value", "dense")


class TwoLayers(nn.Module):
    """The golden's model: dense(tanh(query_key_value(x)))."""

    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(Matrix((10, 14), ("embed", "mlp"), "matrix", True, name="query_key_value")(x))
        return Matrix((14, 6), ("mlp", "embed"), "output", True, name="dense")(hidden)


@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_and_merged_weight_match_peft(goldens, case):
    golden = np.load(goldens / "losses" / "lora.npz")
    with jax.enable_x64(True):
        params = {
            name: {
                "kernel": jnp.asarray(golden[f"base_{name}_weight"].T),
                "bias": jnp.asarray(golden[f"base_{name}_bias"]),
            }
            for name in MATRICES
        }
        adapted = [name for name in MATRICES if f"{case}_{name}_lora_A" in golden]
        scale = float(golden[f"{case}_scaling"])
        factors = {name: [jnp.asarray(golden[f"{case}_{name}_lora_{side}"].T) for side in "AB"] for name in adapted}

        def run(factors, x):
            adapter = {name: {"kernel": LowRank(*pair, scale=scale)} for name, pair in factors.items()}
            return TwoLayers().apply({"params": params, "adapter": adapter}, x[None])[0]

        y, backward = jax.vjp(run, factors, jnp.asarray(golden["x"]))
        of_factors, of_x = backward(jnp.asarray(golden["upstream"]))
        np.testing.assert_allclose(y, golden[f"{case}_y"], rtol=1e-9)
        np.testing.assert_allclose(of_x, golden[f"{case}_dx"], rtol=1e-9, atol=1e-12)
        for name, gradients in of_factors.items():
            for side, gradient in zip("AB", gradients, strict=True):
                expected = golden[f"{case}_d_{name}_lora_{side}"].T
                np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
        merged = LowRank(*factors["query_key_value"], scale=scale).merged(params["query_key_value"]["kernel"])
        np.testing.assert_allclose(merged.T, golden[f"{case}_merged_query_key_value_weight"], rtol=1e-9)


def attention_case(seed=0, dtype=np.float32):
    """Return queries, keys and values of two rows of packed segments, and a prefix of 3 places."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=shape).astype(dtype) for shape in [(2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)])
    prefix = Prefix(*(jnp.asarray(rng.normal(size=(3, 2, 8)).astype(dtype)) for _ in "kv"))
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], jnp.int32)
    return q, k, v, prefix, segments


def visible(segments):
    return Visibility(segment_ids=segments, key_segment_ids=segments, start=jnp.int32(0), prefix=None, mask=None)


@pytest.mark.parametrize("impl", ["reference", "pallas"])
def test_a_prefix_is_keys_that_every_query_sees(impl):
    q, k, v, prefix, segments = attention_case()
    scale = np.random.default_rng(1).uniform(1, 2, (2, 9)).astype(np.float32)
    slopes = jnp.array([0.5, 0.25, 0.1, 0.0])
    window = jnp.int32(3)

    def merged(q, k, v, prefix):
        options = dict(window=window, query_scale=scale, alibi_slopes=slopes)
        return attend(q, k, v, visible(segments), impl=impl, prefix=prefix, **options)

    def outright(q, k, v, prefix):
        """The same by one plain softmax over the prefix and what the window shows of the row."""
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(before[None], (2, *before.shape)), own], axis=1)
            for before, own in ((prefix.k, k), (prefix.v, v))
        )
        distance = np.arange(9)[:, None] - np.arange(9)[None]
        ids = np.asarray(segments)
        seen = (distance >= 0) & (distance < 3) & (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None]
        seen = jnp.concatenate([jnp.ones((2, 9, 3), bool), seen], axis=2)
        bias = jnp.concatenate([np.zeros((9, 3), np.float32), -np.abs(distance).astype(np.float32)], axis=1)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(keys, 2, axis=2)) / 8**0.5 * scale[:, None, :, None]
        scores += slopes[None, :, None, None] * bias[None, None]
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(values, 2, axis=2))

    upstream = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
    upstream[0, 7:] = 0  # padding: nobody reads what it sees
    values, gradients = both(merged, upstream)(q, k, v, prefix)
    expected_values, expected = both(outright, upstream)(q, k, v, prefix)
    np.testing.assert_allclose(values[1], expected_values[1], atol=2e-6)
    np.testing.assert_allclose(values[0, :7], expected_values[0, :7], atol=2e-6)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-6)


def both(function, upstream):
    """Return the jitted values and gradients of a function."""

    @jax.jit
    def run(*arguments):
        values, backward = jax.vjp(function, *arguments)
        return values, backward(jnp.asarray(upstream))

    return run


def test_keys_that_no_query_sees_leave_the_prefix_alone():
    q, k, v, prefix, _ = attention_case()
    nothing = visible(jnp.zeros((2, 9), jnp.int32))
    alone = jax.jit(functools.partial(attend, impl="reference"))(q, k, v, nothing, prefix=prefix)
    scores = jnp.einsum("BTNH,PNH->BNTP", q, jnp.repeat(prefix.k, 2, axis=1)) / 8**0.5
    expected = jnp.einsum("BNTP,PNH->BTNH", jax.nn.softmax(scores), jnp.repeat(prefix.v, 2, axis=1))
    np.testing.assert_allclose(alone, expected, atol=2e-6)
