"""The TPU kernels, interpreted on a CPU or compiled where a TPU is, against attention pair by pair in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import CASES, LENGTH, PREFIX, SEGMENTS, SLOPES, check, check_bfloat16, draw, expected, packed_rows, run
from hypothesis import given, settings

from kernels_pallas import reference
from kernels_pallas.flash_attention import BlockSizes, flash_attention

ON_TPU = jax.default_backend() == "tpu"
TPU = {"impl": "tpu", "interpret": not ON_TPU}


def blocks(queries, keys):
    """Return small blocks, or where they are compiled the smallest that a TPU takes."""
    return (128, 128) if ON_TPU else (queries, keys)


OPTIONS = {**TPU, "block_sizes": blocks(64, 32)}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    arrays = draw(1)
    check(run(arrays, CASES[name], **OPTIONS), expected(arrays, CASES[name]))


def test_other_heads_and_blocks():
    arrays = draw(2, heads=(3, 1), dims=(8, 40))
    case = {"segment_ids": SEGMENTS}
    sizes = BlockSizes(forward=blocks(32, 64), dq=blocks(32, 64), dkv=(128, 128))
    check(run(arrays, case, **TPU, block_sizes=sizes), expected(arrays, case))


def test_keys_in_chunks():
    sizes = BlockSizes(*[blocks(64, 32)] * 3, chunk=blocks(64, 64)[1])
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


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_errs_no_more_than_the_reference(name):
    check_bfloat16(draw(5, dtype=jnp.bfloat16), CASES[name], **OPTIONS)


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


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
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
