"""The TPU kernels through the real TPU compiler, forward and backward, at the sizes they are for."""

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import CHIPS, compile_for, needs_tpu_compiler

from kernels_pallas.flash_attention import flash_attention

pytestmark = needs_tpu_compiler

LENGTH = 4096


def compile_attention(chip, heads, dims, data):
    """Compile values and gradients for B 1, T 4096, bfloat16; heads (N, K), dims (H, Hv); return the HLO text."""

    def compute(q, k, v, do, data):
        o, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, **data), q, k, v)
        return o, pull(do)

    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    arrays = [jax.ShapeDtypeStruct((1, LENGTH, *shape), jnp.bfloat16) for shape in shapes]
    return compile_for(chip, compute, *arrays, data)


CASES = {
    "causal": ((32, 8), (128, 128), {}),
    "window": (
        (32, 8),
        (128, 128),
        {
            "window": jax.ShapeDtypeStruct((), jnp.int32),
            "segment_ids": jax.ShapeDtypeStruct((1, LENGTH), jnp.int32),
            "prefix_mask": jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_),
        },
    ),
    "latent": ((16, 16), (192, 128), {}),
}


QUICK = {("causal", "v5e"), ("latent", "v5p"), ("window", "v6e")}


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        pytest.param(name, chip, marks=() if (name, chip) in QUICK else pytest.mark.slow)
        for name in CASES
        for chip in CHIPS
    ],
)
def test_compiles(name, chip):
    compiled = compile_attention(chip, *CASES[name])
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "jaxllm_flash_forward" in text and "jaxllm_flash_backward" in text
    # One head's scores alone, of 32, would be 64 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20
