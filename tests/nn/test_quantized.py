"""Frozen matrices in 8 and 4 bits: how near they are, how they lie, and that nothing wide is kept of them."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.nn.model import apply
from jaxllm.nn.quantized import BLOCK, NF4_LEVELS, multiply, quantize
from jaxllm.train.tuning import make_tuning
from tests.tiny_models import LLAMA, make_batch, random_params

round_trip = jax.jit(
    lambda kernel, inputs, kind: (narrow := quantize(kernel, inputs, kind), narrow.widened(jnp.float32)),
    static_argnums=(1, 2),
)


@pytest.mark.parametrize("inputs", [(130,), (4, 32)])
def test_every_value_is_within_half_a_step(inputs):
    kernel = np.random.default_rng(0).normal(size=(2, *inputs, 5)).astype(np.float32)
    kernel[0] *= 100
    dims = tuple(range(-1 - len(inputs), -1))
    narrow, wide = round_trip(kernel, dims, "int8")
    step = np.abs(kernel).max(axis=tuple(kernel.ndim + dim for dim in dims), keepdims=True) / 127
    assert narrow.codes.dtype == jnp.int8
    assert narrow.scales.size == 2 * 5
    assert (np.abs(wide - kernel) <= step * 0.5001).all()
    narrow, wide = round_trip(kernel, dims, "nf4")
    assert narrow.codes.nbytes * 2 == kernel.size
    blocks = kernel.reshape(-1, np.gcd(inputs[-1], BLOCK), 5)
    error = np.asarray(wide).reshape(blocks.shape) - blocks
    assert (np.abs(error) <= np.abs(blocks).max(axis=1, keepdims=True) * np.diff(NF4_LEVELS).max() * 0.5001).all()


def test_levels_are_the_quantiles_of_a_normal_distribution():
    # arXiv:2305.14314 eq. 4, as its authors' code computes it: 8 levels above zero and 7 below.
    normal = np.vectorize(statistics.NormalDist().inv_cdf)
    positive, negative = normal(np.linspace(0.9677083, 0.5, 9)[:-1]), -normal(np.linspace(0.9677083, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(levels / np.abs(levels).max(), NF4_LEVELS, atol=2e-5)


def test_levels_and_zeros_come_back_as_they_were():
    kernel = jnp.asarray(np.tile(NF4_LEVELS, 4)[:, None] * np.array([[3.0, 0.0]], np.float32))
    np.testing.assert_allclose(round_trip(kernel, (-2,), "nf4")[1], kernel, rtol=1e-6)
    with pytest.raises(InputError, match="nf4 packs pairs of inputs, found a matrix with 7"):
        quantize(jnp.ones((7, 2)), (-2,), "nf4")


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_the_backward_pass_keeps_codes_not_matrices(base):
    tuning = make_tuning(LLAMA, AdapterConfig(base=base, targets=["q"], rank=2))
    batch = make_batch(np.zeros((1, 4), np.int32))

    def kept(params):
        _, frozen = tuning.split(params)
        factors = jax.tree.map(lambda leaf: jnp.zeros(leaf.value.shape), tuning.trained(), is_leaf=_is_declared)

        def hidden(factors):
            params, adapter = tuning.join(factors, frozen)
            return apply(LLAMA, params, batch, adapter=adapter, return_logits=False).hidden

        return jax.vjp(hidden, factors)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, random_params(LLAMA)))
    matrices = {(3, 24, 4, 8), (3, 24, 2, 8), (3, 4, 8, 24), (3, 24, 40), (3, 40, 24)}
    wide = [leaf for leaf in residuals if leaf.shape in matrices and jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert wide == []
    assert any(leaf.dtype in (jnp.int8, jnp.uint8) for leaf in residuals)


def _is_declared(value):
    return hasattr(value, "axes")


def test_gradients_flow_through_a_widened_matrix():
    kernel = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    narrow, _ = round_trip(kernel, (-2,), "int8")
    run = functools.partial(multiply, lambda weight, x: jnp.sum(jnp.sin(x @ weight)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32))
    gradient = jax.jit(jax.grad(lambda x, weight: run(weight, x)))
    np.testing.assert_allclose(gradient(x, narrow), gradient(x, narrow.widened(jnp.float32)), rtol=1e-5)
