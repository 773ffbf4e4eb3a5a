"""The grouped matmul: every implementation, its values and gradients, against the float64 oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tpu_compiler import CHIPS, compile_for, needs_tpu_compiler

from kernels_pallas import grouped_tpu, reference
from kernels_pallas.grouped_matmul import grouped_matmul

IMPLEMENTATIONS = {"tpu": {"impl": "tpu", "interpret": True}, "gpu": {"impl": "gpu"}, "by device": {}}
ROWS, DEPTH, WIDTH, GROUPS = 1100, 24, 20, 6


def operands(rows=ROWS, depth=DEPTH, width=WIDTH, groups=GROUPS, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape) for shape in ((rows, depth), (groups, depth, width), (rows, width)))
    return tuple(jnp.asarray(array, dtype) for array in (x, w, dy))


def value_and_gradients(multiply, x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
    return y, *pullback(dy)


@functools.partial(jax.jit, static_argnames=("impl", "interpret"))
def found(x, w, sizes, dy, **choice):
    return value_and_gradients(functools.partial(grouped_matmul, **choice), x, w, sizes, dy)


def loop(x, w, sizes, dy):
    """(y, dx, dw) group by group in float64."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros((x.shape[0], w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for group, (start, stop) in enumerate(itertools.pairwise(np.cumsum([0, *sizes]))):
        rows = slice(start, stop)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
    return y, dx, dw


def errors(results, expected):
    return [
        np.abs(np.asarray(one, np.float64) - other).max() / max(np.abs(other).max(), 1e-30)
        for one, other in zip(results, expected, strict=True)
    ]


def assert_exact(results, expected):
    value, *gradients = errors(results, expected)
    assert value <= 2e-6
    assert max(gradients) <= 2e-5


def random_sizes(seed, rows=ROWS, groups=GROUPS):
    """Return group sizes, some 0, that sum to no more than `rows`."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice([0, rows, *rng.integers(0, rows + 1, groups)], groups + 1))
    return np.diff(cuts).astype(np.int32)


def test_the_oracle_is_a_loop_over_groups():
    x, w, dy = operands(rows=40, groups=4)
    sizes = np.array([7, 0, 20, 5], np.int32)
    with jax.enable_x64(True):
        wide = (np.asarray(array, np.float64) for array in (x, w, dy))
        x64, w64, dy64 = wide
        results = value_and_gradients(reference.grouped_matmul, x64, w64, sizes, dy64)
    assert max(errors(results, loop(x, w, sizes, dy))) <= 1e-14


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=0)
def test_random_groups(name, seed):
    x, w, dy = operands()
    sizes = random_sizes(seed)
    assert_exact(found(x, w, sizes, dy, **IMPLEMENTATIONS[name]), loop(x, w, sizes, dy))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes",
    [[0] * 6, [1100, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1100], [512, 0, 128, 384, 0, 76], [1, 1, 1, 1, 1, 1]],
    ids=str,
)
def test_groups_at_the_edges_of_tiles(name, sizes):
    x, w, dy = operands()
    sizes = np.array(sizes, np.int32)
    assert_exact(found(x, w, sizes, dy, **IMPLEMENTATIONS[name]), loop(x, w, sizes, dy))


@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 8, 8), (30, 130, 5), (300, 5, 130)])
def test_few_rows_and_odd_widths(rows, depth, width):
    x, w, dy = operands(rows, depth, width, groups=3)
    sizes = np.array([rows // 3, 0, rows - rows // 3], np.int32)
    assert_exact(found(x, w, sizes, dy, **IMPLEMENTATIONS["tpu"]), loop(x, w, sizes, dy))


def test_matrices_in_parts(monkeypatch):
    """As if the chip's memory held little: several parts of rows, columns and depth, the last ones smaller."""
    monkeypatch.setattr(grouped_tpu, "_OPERAND_BYTES", 2**17)
    monkeypatch.setattr(grouped_tpu, "_SUM_BYTES", 2**18)
    x, w, dy = operands(rows=600, depth=300, width=400, groups=4)
    sizes = np.array([250, 0, 300, 20], np.int32)
    multiply = functools.partial(grouped_matmul, impl="tpu", interpret=True)
    results = jax.jit(functools.partial(value_and_gradients, multiply))(x, w, sizes, dy)
    assert_exact(results, loop(x, w, sizes, dy))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_is_as_exact_as_its_rounding(name):
    x, w, dy = operands(dtype=jnp.bfloat16)
    sizes = random_sizes(3)
    expected = loop(x, w, sizes, dy)
    results = found(x, w, sizes, dy, **IMPLEMENTATIONS[name])
    assert [result.dtype for result in results] == [jnp.bfloat16] * 3
    assert max(errors(results, expected)) <= 2**-8


def test_rows_of_no_group_do_not_matter():
    """Nothing of them leaks into any result, whatever they hold."""
    x, w, dy = operands()
    sizes = np.array([100, 0, 300, 7, 0, 200], np.int32)
    spoilt = (jnp.where((jnp.arange(ROWS) < 607)[:, None], array, jnp.nan) for array in (x, dy))
    x_spoilt, dy_spoilt = spoilt
    results = found(x_spoilt, w, sizes, dy_spoilt, **IMPLEMENTATIONS["tpu"])
    assert_exact(results, loop(x, w, sizes, dy))


def test_a_batch_is_mapped():
    x, w, _ = operands(rows=40, groups=3)
    sizes = np.array([[20, 0, 20], [1, 2, 3]], np.int32)
    mapped = jax.vmap(functools.partial(grouped_matmul, impl="tpu", interpret=True), (None, None, 0))
    results = jax.jit(mapped)(x, w, sizes)
    expected = [loop(x, w, row, results[0])[0] for row in sizes]
    np.testing.assert_allclose(results, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (2, 5, 3), (2,)), "expected x \\[M, D\\]"),
        (((4, 3), (2, 3, 3), (3,)), "expected x \\[M, D\\]"),
        (((4, 40000), (2, 40000, 3), (2,)), "expected at most 24576"),
    ],
)
def test_what_does_not_fit_is_said(shapes, message):
    x, w, sizes = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(grouped_matmul, impl="tpu"), x, w, sizes)


@needs_tpu_compiler
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "sizes",
    [(24576, 2048, 1408, 64), (24576, 5120, 1536, 20), (777, 1000, 200, 8)],
    ids=["DeepSeek-V2-Lite", "DeepSeek-V2 on 8 devices", "odd"],
)
def test_compiles_without_a_copy_of_the_weights(chip, sizes):
    rows, depth, width, groups = sizes
    x, w, dy = ((rows, depth), (groups, depth, width), (rows, width))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, w, dy)]
    group_sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    multiply = functools.partial(grouped_matmul, impl="tpu")
    step = functools.partial(value_and_gradients, multiply)
    compiled = compile_for(chip, step, *arrays[:2], group_sizes, arrays[2])
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    if depth % 128 == 0:
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20
