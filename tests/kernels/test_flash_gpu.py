"""The GPU kernels against attention pair by pair in float64: interpreted on a CPU, compiled where a GPU is.

Without a GPU they are also compiled for H100, where its compiler is installed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import CASES, LENGTH, check, check_bfloat16, draw, expected, masked, packed_rows, run
from gpu_compiler import compile_for_h100, needs_gpu_compiler
from hypothesis import given, settings

from kernels_pallas import reference
from kernels_pallas.flash_attention import BlockSizes, flash_attention
from kernels_pallas.gpu_tiles import pieces

GPU = {"impl": "gpu", "interpret": jax.default_backend() != "gpu"}
OPTIONS = {**GPU, "block_sizes": (32, 16)}
DIMS = (40, 24)
"""Neither is a power of two, nor a multiple of 16."""


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    arrays = draw(1, dims=DIMS)
    check(run(arrays, CASES[name], **OPTIONS), expected(arrays, CASES[name]))


def test_queries_in_the_middle_of_longer_keys_with_a_tile_for_each_kernel():
    arrays = draw(2, length=21, slots=140, heads=(3, 1), dims=(16, 48))
    case = {
        "segment_ids": np.full((2, 21), 2, np.int32),
        "kv_segment_ids": np.array([np.repeat([1, 2], 70), np.repeat([0, 2, 3], [9, 100, 31])], np.int32),
        "query_start": np.int32(80),
        "window": np.int32(50),
    }
    sizes = BlockSizes(forward=(16, 32), dq=(32, 64), dkv=(16, 64))
    check(run(arrays, case, **GPU, block_sizes=sizes), expected(arrays, case))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_errs_no_more_than_the_reference(name):
    check_bfloat16(draw(3, dtype=jnp.bfloat16, dims=DIMS), CASES[name], **OPTIONS)


@settings(max_examples=25)
@given(packed_rows())
def test_random_packed_documents(case):
    arrays = draw(1, dims=DIMS)
    check(run(arrays, case, **OPTIONS), expected(arrays, case))


def test_tiles_in_which_nothing_is_visible_are_not_read():
    arrays = draw(1, dims=DIMS)
    q, k, v, do, dlse = arrays
    slots = np.arange(LENGTH)
    # Slots 64 to 127 are whole tiles, of 32 queries and of 16 keys; those of all other tiles hold no number.
    inside = ((slots >= 64) & (slots < 128))[None, :, None, None]
    poisoned = [jnp.where(inside, x, jnp.nan) for x in (q, k, v, do)]
    case = masked(np.where(inside[..., 0, 0], 1, 0).repeat(2, axis=0).astype(np.int32), window=16)
    check(run((*poisoned, dlse), case, **OPTIONS), expected(arrays, case))


def test_one_program_serves_all_windows_of_a_scan():
    q, k, v, _, _ = draw(4, dims=(16, 16))
    windows = jnp.array([3, 40, LENGTH], jnp.int32)

    @jax.jit
    def layers(q, windows):
        def layer(x, window):
            return flash_attention(x, k, v, window=window, **OPTIONS), None

        return jax.lax.scan(layer, q, windows)[0]

    def one(x, window):
        return reference.flash_attention(x, k, v, window=window)

    for order in (windows, windows[::-1]):
        np.testing.assert_allclose(layers(q, order), functools.reduce(one, order, q), atol=1e-5)
    assert layers._cache_size() == 1


@pytest.mark.parametrize(("width", "sizes"), [(128, [128]), (192, [128, 64]), (80, [64, 16]), (576, [512, 64])])
def test_head_dims_are_cut_into_powers_of_two_without_padding(width, sizes):
    cuts = pieces(width)
    assert [cut.size for cut in cuts] == sizes
    assert [cut.start for cut in cuts] == [0, *np.cumsum(sizes)[:-1]]


@pytest.mark.parametrize(
    ("dims", "sizes", "message"),
    [
        ((16, 16), (48, 32), r"block_sizes: found \(48, 32\), expected powers of two of at least 16"),
        ((16, 16), (32, 8), r"block_sizes: found \(32, 8\), expected powers of two of at least 16"),
        ((592, 512), None, r"q, v: found head dims \(592, 512\), expected at most \(576, 512\)"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(dims, sizes, message):
    q, k, v, _, _ = draw(5, length=16, heads=(1, 1), dims=dims)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, **GPU, block_sizes=sizes)


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("heads", "dims", "case", "dtype"),
    [
        ((32, 8), (128, 128), {}, jnp.bfloat16),
        ((32, 8), (128, 128), {"window": None, "segment_ids": None}, jnp.bfloat16),
        ((32, 8), (128, 128), {"segment_ids": None, "query_scale": None}, jnp.bfloat16),
        ((32, 32), (192, 128), {"segment_ids": None}, jnp.bfloat16),
        ((8, 8), (80, 80), {"prefix_mask": None, "alibi_slopes": None}, jnp.bfloat16),
        ((8, 2), (128, 128), {"segment_ids": None}, jnp.float32),
    ],
    ids=["causal", "window", "query scale", "latent", "prefix and ALiBi", "float32"],
)
def test_compiles_for_h100(heads, dims, case, dtype):
    length = 4096
    kinds = {
        "segment_ids": ((1, length), jnp.int32),
        "prefix_mask": ((1, length), jnp.bool),
        "query_scale": ((1, length), jnp.float32),
        "alibi_slopes": (heads[:1], jnp.float32),
        "window": ((), jnp.int32),
    }
    data = {name: jax.ShapeDtypeStruct(*kinds[name]) for name in case}
    arrays = [
        jax.ShapeDtypeStruct((1, length, *shape), dtype)
        for shape in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    ]

    def gradients(q, k, v, do, data):
        o, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, impl="gpu", **data), q, k, v)
        return o, pull(do)

    kernels = compile_for_h100(gradients, *arrays, data)
    assert set(kernels) == {"jaxllm_flash_forward", "jaxllm_flash_dq", "jaxllm_flash_dkv"}
    for kernel in kernels.values():
        assert kernel.shared_memory <= 227 * 1024
        if dtype == jnp.bfloat16:
            assert kernel.ptx is None or "wgmma.mma_async" in kernel.ptx
            # A scale of each query is a few registers more than dk's kernel has.
            assert kernel.spilled is None or kernel.spilled <= (32 if "query_scale" in case else 0)
