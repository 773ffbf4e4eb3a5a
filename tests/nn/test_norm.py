"""Norms against their formulas in float64, and the precision they keep in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.nn.norm import Normalize, layer_norm, rms_norm
from jaxllm.nn.param import is_declared
from jaxllm.spec import Norm

WIDTH = 12
RNG = np.random.default_rng(0)
SCALE, BIAS = RNG.normal(size=(2, WIDTH)).astype(np.float32)
rms, layer = jax.jit(rms_norm), jax.jit(layer_norm)


def rows(seed, size, offset):
    return (np.random.default_rng(seed).normal(size=(2, 3, WIDTH)) * size + offset).astype(np.float32)


inputs = {"seed": st.integers(0, 99), "size": st.sampled_from([1e-3, 1.0, 50.0]), "offset": st.floats(-10, 10)}


@given(**inputs, eps=st.sampled_from([1e-5, 1.5625e-7, 0.5]))
def test_rms_norm_is_its_formula(seed, size, offset, eps):
    x = rows(seed, size, offset)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * SCALE
    np.testing.assert_allclose(rms(x, SCALE, eps), expected, rtol=1e-4, atol=1e-5)


@given(**inputs, eps=st.sampled_from([1e-5, 0.5]))
def test_layer_norm_is_its_formula(seed, size, offset, eps):
    x = rows(seed, size, offset)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * SCALE + BIAS
    np.testing.assert_allclose(layer(x, SCALE, BIAS, eps), expected, rtol=1e-3, atol=2e-3)


@given(seed=st.integers(0, 99), factor=st.sampled_from([0.25, 8.0]))
def test_norms_see_directions_only(seed, factor):
    x = rows(seed, 1.0, 0.0)
    np.testing.assert_allclose(rms(x * factor, SCALE, 1e-12), rms(x, SCALE, 1e-12), atol=1e-5)
    moved = layer(x * factor + 3.0, SCALE, BIAS, 1e-12)
    np.testing.assert_allclose(moved, layer(x, SCALE, BIAS, 1e-12), atol=1e-4)


def test_statistics_of_bfloat16_rows_are_float32():
    # Squares of 300 in bfloat16 would be off by up to 0.4 %, and their mean over 1024 by far more.
    x = jnp.asarray(np.linspace(290, 310, 1024), jnp.bfloat16)[None]
    ones, zeros = jnp.ones(1024, jnp.bfloat16), jnp.zeros(1024, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    assert rms(x, ones, 1e-6).dtype == layer(x, ones, zeros, 1e-6).dtype == jnp.bfloat16
    expected = exact / np.sqrt((exact**2).mean())
    np.testing.assert_allclose(np.asarray(rms(x, ones, 1e-6), np.float64), expected, rtol=2**-8)
    expected = (exact - exact.mean()) / exact.std()
    np.testing.assert_allclose(np.asarray(layer(x, ones, zeros, 1e-6), np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(("kind", "names"), [("rms", {"scale"}), ("layer", {"scale", "bias"})])
def test_a_norm_declares_what_it_has_and_starts_as_the_identity(kind, names):
    module = Normalize(Norm(eps=1e-5, kind=kind))
    declared = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32))
    kinds = jax.tree.map(lambda leaf: (leaf.kind, leaf.axes, leaf.value.shape), declared["params"], is_leaf=is_declared)
    assert set(kinds) == names
    assert kinds["scale"] == ("ones", ("norm",), (WIDTH,))
    assert kinds.get("bias", ("zeros", ("norm",), (WIDTH,))) == ("zeros", ("norm",), (WIDTH,))
