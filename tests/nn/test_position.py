"""Rotary positions against goldens from other implementations and against the formulas in exact arithmetic."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.nn.position import (
    alibi_slopes,
    apply_rope,
    chunked_ntk_alpha,
    chunked_ntk_theta,
    dynamic_ntk_theta,
    inverse_frequencies,
    logn_scale,
    rope_tables,
    yarn_inverse_frequencies,
    yarn_mscale,
)
from jaxllm.spec import ChunkedNTK, DynamicNTK, LinearScaling, LogN, Rope, Rope2D, Yarn

tables_of = jax.jit(rope_tables, static_argnums=(0, 2), static_argnames="train")
turn = jax.jit(apply_rope)


@pytest.fixture(scope="module")
def golden(goldens):
    return np.load(goldens / "long_context_rope.npz")


def test_chunked_ntk_matches_the_published_formula(golden):
    lengths, train_length, head_dim = (
        golden["qwen_lengths"],
        int(golden["qwen_train_len"]),
        int(golden["qwen_head_dim"]),
    )
    np.testing.assert_array_equal(chunked_ntk_alpha(lengths, train_length), golden["qwen_ntk_alpha"])
    theta = chunked_ntk_theta(1e4, jnp.asarray(lengths), train_length=train_length, head_dim=head_dim)
    np.testing.assert_allclose(inverse_frequencies(head_dim, theta), golden["qwen_inv_freq"], rtol=5e-7)


@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384])
def test_dynamic_ntk_matches_transformers(golden, length):
    theta = dynamic_ntk_theta(1e4, length, factor=2.0, original_max_position=2048, head_dim=128)
    expected = golden[f"hf_dynamic_ntk_factor2_seq{length}_inv_freq"]
    np.testing.assert_allclose(inverse_frequencies(128, theta), expected, rtol=5e-7)


def test_dynamic_ntk_leaves_short_calls_alone():
    theta = dynamic_ntk_theta(1e4, jnp.array([1, 15, 16, 17]), factor=2.0, original_max_position=16, head_dim=8)
    assert (np.asarray(theta[:3]) == 1e4).all()
    assert theta[3] > 1e4


def test_logn_matches_the_published_formula(golden):
    logn = LogN(train_length=int(golden["qwen_train_len"]))
    in_table = (
        golden["qwen_lengths"] < 32768
    )  # the published table ends there; beyond, the golden repeats its last entry
    scale = logn_scale(logn, jnp.asarray(golden["qwen_lengths"] - 1))
    np.testing.assert_allclose(scale[in_table], golden["qwen_logn_at_lengths"][in_table], rtol=5e-7)
    np.testing.assert_allclose(scale, golden["qwen_logn_at_lengths"], rtol=5e-6)


@given(length=st.integers(1, 2**30), train_length=st.integers(1, 2**20))
def test_alpha_is_exact_in_integers(length, train_length):
    doublings = next(n for n in itertools.count() if length <= train_length << n)
    expected = 1 if doublings == 0 else 2 ** (doublings + 1) - 1
    assert float(chunked_ntk_alpha(np.full(1, length), train_length)[0]) == float(np.float32(expected))


def test_inverse_frequencies_at_head_dim_128():
    expected = 1e6 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(inverse_frequencies(128, 1e6), expected, rtol=3e-7)


def rotate(x, positions, theta):
    """Rotate by complex multiplication in float64; x [B, T, N, H]."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


SCALINGS = {
    "none": (None, 1.0, 500.0),
    "linear": (LinearScaling(factor=4.0), 0.25, 500.0),
    "dynamic": (DynamicNTK(factor=2.0, original_max_position=4), 1.0, 500.0 * (2 * 10 / 4 - 1) ** (8 / 6)),
    "chunked": (ChunkedNTK(train_length=4), 1.0, 500.0 * 7 ** (8 / 6)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_is_a_complex_product(name):
    scaling, stretch, theta = SCALINGS[name]
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 100, (2, 5))
    lengths = jnp.full(2, 10, jnp.int32)
    tables = tables_of(Rope(theta=500.0, scaling=scaling), jnp.asarray(positions), 8, length=lengths, train=False)
    turned = turn(jnp.asarray(x, jnp.float32), tables)
    np.testing.assert_allclose(turned, rotate(x, positions * stretch, theta), atol=2e-5)


def test_training_turns_off_chunked_scaling_but_not_dynamic():
    positions, lengths = jnp.arange(10)[None], jnp.full(1, 10, jnp.int32)

    def tables(scaling, train):
        return np.asarray(tables_of(Rope(scaling=scaling), positions, 8, length=lengths, train=train).cos)

    chunked, dynamic = ChunkedNTK(train_length=4), DynamicNTK(factor=2.0, original_max_position=4)
    np.testing.assert_array_equal(tables(chunked, True), tables(None, True))
    assert np.abs(tables(chunked, False) - tables(None, False)).max() > 0.1
    np.testing.assert_array_equal(tables(dynamic, True), tables(dynamic, False))


def test_rows_of_different_length_have_their_own_base():
    rope = Rope(scaling=ChunkedNTK(train_length=4))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    both = tables_of(rope, positions, 8, length=jnp.array([4, 9]), train=False)
    for row, length in enumerate([4, 9]):
        alone = tables_of(rope, positions[:1], 8, length=jnp.array([length]), train=False)
        np.testing.assert_array_equal(both.sin[row], alone.sin[0])


def test_rotation_keeps_the_dtype_and_turns_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.bfloat16)
    positions = jnp.array([[0, 1, 1000, 30000]])
    tables = tables_of(Rope(), positions, 8, length=jnp.array([4]), train=False)
    turned = turn(x, tables)
    assert turned.dtype == jnp.bfloat16
    assert tables.cos.dtype == jnp.float32
    expected = rotate(np.asarray(x, np.float64), np.asarray(positions), 1e4)
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, atol=0.02)


def test_neighbours_turn_where_the_layout_is_interleaved():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 100, (2, 5))
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    expected = rotate(halves, positions, 1e4)
    tables = tables_of(Rope(layout="interleaved"), jnp.asarray(positions), 8, length=jnp.full(2, 5), train=False)
    turned = np.asarray(turn(jnp.asarray(x, jnp.float32), tables))
    np.testing.assert_allclose(np.concatenate([turned[..., 0::2], turned[..., 1::2]], axis=-1), expected, atol=2e-5)


def test_dimensions_beyond_the_rotated_ones_stay():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)).astype(np.float32), rng.integers(0, 100, (2, 5))
    tables = tables_of(Rope(rotary_fraction=0.5), jnp.asarray(positions), 4, length=jnp.full(2, 5), train=False)
    turned = turn(jnp.asarray(x), tables)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], rotate(x[..., :4], positions, 1e4), atol=2e-5)


def test_two_positions_turn_the_two_halves_of_a_head():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions, blocks = rng.integers(0, 100, (2, 2, 5))
    tables = tables_of(
        Rope2D(), jnp.asarray(positions), 8, length=jnp.full(2, 5), train=False, block_positions=jnp.asarray(blocks)
    )
    turned = turn(jnp.asarray(x), tables)
    np.testing.assert_allclose(turned[..., :4], rotate(x[..., :4], positions, 1e4), atol=2e-5)
    np.testing.assert_allclose(turned[..., 4:], rotate(x[..., 4:], blocks, 1e4), atol=2e-5)


def test_frequencies_are_rounded_where_a_checkpoint_was_trained_so():
    exact, rounded = (
        tables_of(Rope(inv_freq_dtype=dtype), jnp.array([[1000]]), 16, length=jnp.array([1]), train=False).cos
        for dtype in ("float32", "float16")
    )
    frequencies = (1e4 ** (-np.arange(0, 16, 2) / 16)).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(rounded[0, 0, 0], np.cos(1000 * frequencies), atol=1e-4)
    assert np.abs(rounded - exact).max() > 1e-2


def test_yarn_agrees_with_the_reference(golden):
    yarn = Yarn(factor=40.0, original_max_position=4096, mscale=0.707, mscale_all_dim=0.707)
    np.testing.assert_allclose(yarn_inverse_frequencies(yarn, 1e4, 64), golden["dsv2_yarn_inv_freq"], rtol=1e-5)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(float(golden["dsv2_sqrt_t_paper"]), abs=1e-5)
    plain = Yarn(factor=16.0, original_max_position=4096)
    np.testing.assert_allclose(yarn_inverse_frequencies(plain, 1e4, 128), golden["yarn_plain_s16_inv_freq"], rtol=1e-5)
    factor = float(golden["yarn_plain_s16_attention_factor"])
    assert yarn_mscale(plain.factor, plain.mscale) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("num_heads", [1, 4, 6, 8, 40])
def test_alibi_slopes_of_any_number_of_heads(num_heads):
    slopes = alibi_slopes(num_heads)
    power = 1 << (num_heads.bit_length() - 1)
    ratio = 2.0 ** (-(2.0 ** -(math.log2(power) - 3)))
    np.testing.assert_allclose(slopes[:power], [ratio ** (i + 1) for i in range(power)], rtol=1e-6)
    extra = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
    np.testing.assert_allclose(slopes[power:], [extra ** (2 * i + 1) for i in range(num_heads - power)], rtol=1e-6)
