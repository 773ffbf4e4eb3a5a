"""The TPU kernels, interpreted on a CPU, against attention written pair by pair in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import CASES, LENGTH, PREFIX, SEGMENTS, SLOPES, check, draw, expected, masked, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import reference
from kernels_pallas.flash_attention import BlockSizes, flash_attention

TPU = {"impl": "tpu", "interpret": True}
OPTIONS = {**TPU, "block_sizes": (64, 32)}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    arrays = draw(1)
    check(run(arrays, CASES[name], **OPTIONS), expected(arrays, CASES[name]))


def test_other_heads_and_blocks():
    arrays = draw(2, heads=(3, 1), dims=(8, 40))
    case = {"segment_ids": SEGMENTS}
    check(run(arrays, case, **TPU, block_sizes=BlockSizes((32, 64), (32, 64), (128, 128))), expected(arrays, case))


def test_keys_in_chunks():
    sizes = BlockSizes((64, 32), (64, 32), (64, 32), chunk=64)
    arrays = draw(3)
    case = {"alibi_slopes": SLOPES, "prefix_mask": PREFIX}
    check(run(arrays, case, **TPU, block_sizes=sizes), expected(arrays, case))


def test_queries_in_the_middle_of_longer_keys_with_default_blocks():
    arrays = draw(4, length=21, slots=140, heads=(2, 2), dims=(48, 32))
    kv_segments = np.array([np.repeat([1, 2], 70), np.repeat([0, 2, 3], [9, 100, 31])], np.int32)
    case = {
        "segment_ids": np.full((2, 21), 2, np.int32),
        "kv_segment_ids": kv_segments,
        "query_start": np.int32(80),
        "window": np.int32(50),
    }
    check(run(arrays, case, **TPU), expected(arrays, case))


def test_bfloat16_errs_by_a_unit_in_the_last_place_as_the_reference_does():
    arrays = draw(5, dtype=jnp.bfloat16)
    case = CASES["everything"]
    wanted = expected(arrays, case)
    check(run(arrays, case, **OPTIONS), wanted, 2**-7, 2**-7)
    check(run(arrays, case, attend=reference.flash_attention), wanted, 2**-7, 2**-7)


@st.composite
def packed_rows(draw):
    """Draw two rows of documents, a part of each of them a prefix, padding between and after them, and a window."""
    segments, prefix = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), bool)
    for row in range(2):
        start, number = 0, 0
        while start < LENGTH:
            length = draw(st.integers(1, 90))
            number += 1
            stop = min(start + length, LENGTH)
            segments[row, start:stop] = number * draw(st.sampled_from([0, 1, 1, 1]))
            prefix[row, start : min(start + draw(st.integers(0, length)), stop)] = True
            start = stop
    return masked(segments, prefix, draw(st.one_of(st.just(LENGTH), st.integers(0, LENGTH))))


@settings(max_examples=25)
@given(packed_rows())
def test_random_packed_documents(case):
    arrays = draw(6)
    check(run(arrays, case, **OPTIONS), expected(arrays, case))


def test_one_program_serves_all_windows_of_a_scan():
    q, k, v, _, _ = draw(7)
    windows = jnp.array([3, 40, LENGTH], jnp.int32)

    @jax.jit
    def layers(q, windows):
        def layer(x, window):
            return flash_attention(x, k, jnp.tile(v, 2)[..., :24], window=window, **OPTIONS), None

        return jax.lax.scan(layer, q, windows)[0]

    def one(x, window):
        return reference.flash_attention(x, k, jnp.tile(v, 2)[..., :24], window=window)

    for order in (windows, windows[::-1]):
        np.testing.assert_allclose(layers(q, order), functools.reduce(one, order, q), atol=1e-5)
    assert layers._cache_size() == 1
    assert str(layers.trace(q, windows).jaxpr).count("name=jaxllm_flash_forward") == 1


def test_under_shard_map():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, rows, lse = jax.P("data", None, "tensor"), jax.P("data"), jax.P("data", "tensor")

    def attend(q, k, v, *, query_scale, return_lse, segment_ids):
        def local(q, k, v, segment_ids):
            return flash_attention(q, k, v, segment_ids=segment_ids, return_lse=return_lse, **OPTIONS)

        in_specs = (heads, heads, heads, rows)
        sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(heads, lse), check_vma=False)
        return sharded(q, k, v, segment_ids)

    arrays = draw(8)
    case = {"segment_ids": SEGMENTS}
    check(run(arrays, case, attend=attend), expected(arrays, case))
