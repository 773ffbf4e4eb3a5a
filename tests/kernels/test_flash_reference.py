"""The oracle in jax.numpy against the one written pair by pair, in float64; what callers are told when they err."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import CASES, check, draw, expected, run

from kernels_pallas import reference
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.platform import implementation


@pytest.mark.parametrize("name", ["everything", "all", "segments in any order", "window of nothing"])
def test_reference_is_exact_in_float64(name):
    case = {key: x.astype(np.float64) if key == "query_scale" else x for key, x in CASES[name].items()}
    with jax.enable_x64(True):
        arrays = [x.astype(jnp.float64) for x in draw(0)]
        found = run(arrays, case, attend=reference.flash_attention)
        assert found["o"].dtype == jnp.float64
    check(found, expected(arrays, case), 1e-12, 1e-12)


def test_the_default_device_chooses_the_implementation():
    assert implementation(None) == "reference"
    assert implementation(None, interpret=True) == "tpu"
    assert implementation("gpu") == "gpu"
    with pytest.raises(ValueError, match="found 'cuda', expected one of"):
        implementation("cuda")
    q, k, v, _, _ = draw(0)
    assert flash_attention(q, k, v).shape == (2, 150, 4, 16)


BAD = {
    "q: found 4 heads, expected a multiple of k's 3": {"k": (2, 8, 3, 16), "v": (2, 8, 3, 16)},
    r"k: found shape \(2, 8, 2, 8\), expected \(2, 8, 2, 16\)": {"k": (2, 8, 2, 8)},
    r"v: found shape \(2, 9, 2, 16\), expected \(2, 8, 2, 16\)": {"v": (2, 9, 2, 16)},
    "q: found shape .* expected 4 axes": {"q": (2, 8, 64)},
    r"segment_ids: found shape \(2, 7\), expected \(2, 8\)": {"segment_ids": np.ones((2, 7), int)},
    "segment_ids: found dtype float32, expected integers": {"segment_ids": np.ones((2, 8), np.float32)},
    "kv_segment_ids: found without segment_ids": {"kv_segment_ids": np.ones((2, 8), int)},
    r"prefix_mask: found shape \(8,\), expected \(2, 8\)": {"prefix_mask": np.ones(8, bool)},
    r"alibi_slopes: found shape \(2,\), expected \(4,\)": {"alibi_slopes": np.ones(2)},
    r"query_scale: found shape \(8,\), expected \(2, 8\)": {"query_scale": np.ones(8)},
    r"window: found Array\(\[3\], .* expected an integer": {"window": jnp.array([3], jnp.int32)},
    "query_start: found 1.5, expected an integer": {"query_start": 1.5},
    "soft_cap: found 0.0, expected a positive number": {"soft_cap": 0.0},
    "impl: found 'mlu', expected one of": {"impl": "mlu"},
    r"block_sizes: found 128, expected \(queries, keys\)": {"block_sizes": 128},
    r"block_sizes: found \(128,\), expected \(queries, keys\)": {"block_sizes": (128,)},
    r"block_sizes: found \(100, 128\), expected multiples of 128": {"impl": "tpu", "block_sizes": (100, 128)},
    "q: found dtype float16, expected float32 or bfloat16": {"impl": "tpu", "dtype": jnp.float16},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    bad = dict(BAD[message])
    dtype = bad.pop("dtype", jnp.float32)
    shapes = {"q": (2, 8, 4, 16), "k": (2, 8, 2, 16), "v": (2, 8, 2, 16)}
    arrays = {name: jnp.zeros(bad.pop(name, shape), dtype) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arrays, **bad)
