"""Attention of one token over a cache: the TPU kernel against the float64 oracle, and the oracle against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tpu_compiler import CHIPS, compile_for, needs_tpu_compiler

from kernels_pallas import reference
from kernels_pallas.decode_attention import decode_attention

BATCH, SLOTS, BLOCK = 4, 40, 16
LENGTHS = np.array([40, 17, 0, 1], np.int32)
SEGMENTS = np.ones((BATCH, SLOTS), np.int32)
SEGMENTS[0, :21] = SEGMENTS[1, 3:9] = SEGMENTS[3] = 0


def normal(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def cache(heads, kv_heads, width=16, value_width=16, stack=()):
    """Return q, keys and values."""
    keys = (*stack, BATCH, SLOTS, kv_heads)
    return normal(0, BATCH, heads, width), normal(1, *keys, width), normal(2, *keys, value_width)


def latent(heads, *, kv_heads=1, rope_heads=1, stack=()):
    """Return q, latents that are keys and values, and the rotary parts."""
    q, latents, _ = cache(heads, kv_heads, 32, stack=stack)
    rope = {"query_rope": normal(3, BATCH, heads, 8), "key_rope": normal(4, *stack, BATCH, SLOTS, rope_heads, 8)}
    return (q, latents, None), {**rope, "softmax_scale": 0.2}


SLOPES, LOG_N = normal(5, 6) ** 2, 1 + normal(6, BATCH) ** 2
CASES = {
    "grouped heads": (cache(6, 2), {}),
    "one kv head": (cache(6, 1), {}),
    "as many kv heads, long values": (cache(3, 3, value_width=24), {}),
    "window": (cache(6, 2), {"window": np.int32(9)}),
    "window of one": (cache(6, 2), {"window": 1}),
    "ALiBi": (cache(6, 2), {"alibi_slopes": SLOPES, "window": 20}),
    "LogN, soft cap, ALiBi": (cache(6, 2), {"query_scale": LOG_N, "soft_cap": 2.0, "alibi_slopes": SLOPES}),
    "padding": (cache(6, 2), {"segment_ids": SEGMENTS}),
    "padding, window": (cache(6, 2), {"segment_ids": SEGMENTS, "window": 19}),
    "latents": latent(6),
    "rotary part of each head": latent(6, kv_heads=2, rope_heads=2),
    "one rotary part": latent(6, kv_heads=2),
    "layer": (cache(6, 2, stack=(3,)), {"layer": np.int32(1)}),
    "layer of latents": (latent(6, stack=(3,))[0], {**latent(6, stack=(3,))[1], "layer": np.int32(2)}),
}


@functools.partial(jax.jit, static_argnames=("softmax_scale", "soft_cap", "block_size"))
def kernel(arrays, options, *, block_size=BLOCK, **constants):
    return decode_attention(*arrays, impl="tpu", interpret=True, block_size=block_size, **options, **constants)


def split(options):
    """Return (options that are data, options that are constants)."""
    constants = {name: options[name] for name in ("softmax_scale", "soft_cap") if name in options}
    return {name: value for name, value in options.items() if name not in constants}, constants


def run(arrays, options, lengths=LENGTHS, block_size=BLOCK):
    data, constants = split(options)
    return kernel((*arrays, lengths), data, block_size=block_size, **constants)


def oracle(arrays, options, lengths=LENGTHS):
    """The reference in float64."""

    def widen(value):
        return value if np.ndim(value) == 0 or value.dtype == np.int32 else np.asarray(value, np.float64)

    with jax.enable_x64(True):
        arrays, options = jax.tree.map(widen, (arrays, options))
        return np.asarray(reference.decode_attention(*arrays, lengths, **options))


def error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


def loop(q, k, v, lengths, window, slopes, log_n, segments, cap, scale):
    """Row by row, head by head, over the visible slots alone."""
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    for row, head in np.ndindex(q.shape[:2]):
        kv_head, query = head // (q.shape[1] // k.shape[2]), lengths[row] - 1
        slots = [j for j in range(max(0, lengths[row] - window), lengths[row]) if segments[row, j]]
        if not slots:
            continue
        scores = k[row, slots, kv_head].astype(float) @ q[row, head] * scale * log_n[row]
        scores = cap * np.tanh(scores / cap) - slopes[head] * (query - np.array(slots))
        p = np.exp(scores - scores.max())
        o[row, head] = p / p.sum() @ v[row, slots, kv_head]
    return o


def test_the_oracle_is_a_loop_over_visible_slots():
    arrays, options = cache(6, 2), {"window": 20, "alibi_slopes": SLOPES, "query_scale": LOG_N, "soft_cap": 2.0}
    options |= {"segment_ids": SEGMENTS, "softmax_scale": 0.4}
    expected = loop(*arrays, LENGTHS, 20, SLOPES, LOG_N, SEGMENTS, 2.0, 0.4)
    assert error(oracle(arrays, options), expected) <= 1e-12
    assert (expected[2:] == 0).all()


def test_the_absorbed_form_is_one_product_of_wider_queries_and_keys():
    (q, latents, _), rope = latent(6)
    wide = np.concatenate([q, rope["query_rope"]], -1), np.concatenate([latents, rope["key_rope"]], -1), latents
    assert error(oracle((q, latents, None), rope), oracle(wide, {"softmax_scale": 0.2})) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    arrays, options = CASES[name]
    found, expected = run(arrays, options), oracle(arrays, options)
    assert error(found, expected) <= 2e-6
    assert (np.asarray(found)[2] == 0).all()


@pytest.mark.parametrize("name", ["grouped heads", "padding, window", "latents"])
def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16(name):
    arrays, options = CASES[name]
    arrays, options = jax.tree.map(
        lambda value: jnp.asarray(value, jnp.bfloat16) if getattr(value, "dtype", None) == np.float32 else value,
        (arrays, options),
    )
    found, expected = run(arrays, options), oracle(arrays, options)
    assert found.dtype == jnp.bfloat16
    rounded = reference.decode_attention(*arrays, LENGTHS, **options)
    assert error(found, expected) <= max(1.5 * error(rounded, expected), 2**-8)


def test_the_kernel_takes_no_float64():
    with jax.enable_x64(True), pytest.raises(ValueError, match="q: found dtype float64"):
        arrays = [np.asarray(array, np.float64) for array in cache(6, 2)]
        decode_attention(*arrays, LENGTHS, impl="tpu", interpret=True)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, SLOTS), min_size=BATCH, max_size=BATCH),
    window=st.integers(1, SLOTS + 3),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@example(lengths=[SLOTS] * BATCH, window=SLOTS, hidden=1.0, seed=0)
@example(lengths=[16, 17, 32, 33], window=16, hidden=0.0, seed=0)
def test_random_lengths_windows_and_padding(lengths, window, hidden, seed):
    segments = (np.random.default_rng(seed).random((BATCH, SLOTS)) >= hidden).astype(np.int32)
    arrays, lengths = cache(6, 2), np.array(lengths, np.int32)
    options = {"window": np.int32(window), "segment_ids": segments, "alibi_slopes": SLOPES}
    found, expected = run(arrays, options, lengths), oracle(arrays, options, lengths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(arrays[2]).max())


def test_blocks_in_which_a_row_sees_nothing_are_not_read():
    """They may hold NaN, as memory does that nothing was written to."""
    lengths, window = np.array([40, 30, 12, 0], np.int32), np.int32(7)
    q, k, v = cache(6, 2)
    slot = np.arange(SLOTS)[None]
    first, last = np.maximum(lengths - window, 0) // 8, np.maximum(lengths - 1, 0) // 8
    live = (slot // 8 >= first[:, None]) & (slot // 8 <= last[:, None])
    spoilt = (np.where(live[:, :, None, None], part, np.nan) for part in (k, v))
    found = run((q, *spoilt), {"window": window}, lengths, block_size=8)
    assert error(found, oracle((q, k, v), {"window": window}, lengths)) <= 2e-6


def test_a_window_and_a_layer_are_data():
    """One compiled kernel serves all layers of a scan and any window."""
    arrays = cache(6, 2, stack=(3,))

    @jax.jit
    def scan(windows):
        def layer(_, inputs):
            number, window = inputs
            options = {"layer": number, "window": window, "impl": "tpu", "interpret": True, "block_size": BLOCK}
            return None, decode_attention(*arrays, LENGTHS, **options)

        return jax.lax.scan(layer, None, (jnp.arange(3), windows))[1]

    windows = np.array([5, 40, 18], np.int32)
    for number, found in enumerate(scan(windows)):
        assert error(found, oracle(arrays, {"layer": number, "window": windows[number]})) <= 2e-6


def test_on_a_cpu_the_reference_serves():
    arrays, options = CASES["LogN, soft cap, ALiBi"]
    assert error(decode_attention(*arrays, LENGTHS, **options), oracle(arrays, options)) <= 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (4, 5, 16)}, "q: found 5 heads, expected a multiple of k_cache's 2"),
        ({"q": (4, 6, 8)}, "k_cache: found shape"),
        ({"v_cache": (4, 30, 2, 16)}, "v_cache: found shape"),
        ({"lengths": (3,)}, "lengths: found shape"),
        ({"alibi_slopes": (2,)}, "alibi_slopes: found shape"),
        ({"segment_ids": (4, 1)}, "segment_ids: found shape"),
        ({"layer": ()}, "k_cache: found .* expected 5 axes with a layer"),
        ({"query_rope": (4, 6, 8)}, "expected both or none"),
        ({"query_rope": (4, 6, 8), "key_rope": (4, 40, 3, 8)}, "key_rope: found shape"),
        ({"block_size": 24}, "block_size: found 24"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(change, message):
    shapes = {"q": (4, 6, 16), "k_cache": (4, 40, 2, 16), "v_cache": (4, 40, 2, 16), "lengths": (4,)}
    sizes = {name: change[name] for name in ("block_size",) if name in change}
    shapes |= {name: shape for name, shape in change.items() if name not in sizes}
    arrays = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(decode_attention, impl="tpu", **sizes), **arrays)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled_shapes(heads, kv_heads, width, rope=None, layers=3, batch=8, slots=4096):
    """Return a stacked cache's arguments: all that is data, or the latents and rotary parts of the absorbed form."""
    arguments = {
        "q": shape(batch, heads, width),
        "k_cache": shape(layers, batch, slots, kv_heads, width),
        "lengths": shape(batch, dtype=jnp.int32),
        "layer": shape(dtype=jnp.int32),
    }
    if rope is not None:
        return arguments | {"query_rope": shape(batch, heads, rope), "key_rope": shape(layers, batch, slots, 1, rope)}
    return arguments | {
        "v_cache": arguments["k_cache"],
        "window": shape(dtype=jnp.int32),
        "alibi_slopes": shape(heads, dtype=jnp.float32),
        "query_scale": shape(batch, dtype=jnp.float32),
        "segment_ids": shape(batch, slots, dtype=jnp.int32),
    }


@needs_tpu_compiler
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "sizes",
    [(32, 8, 128), (4, 1, 128), (40, 40, 128), (16, 1, 512, 64), (128, 1, 512, 64)],
    ids=["32 on 8", "4 on 1", "40", "16 latent", "128 latent"],
)
def test_compiles_and_reads_the_cache_in_place(chip, sizes):
    """Apart from the rotary parts, which lie otherwise in memory until a loop's state takes the kernel's layout."""
    shapes = compiled_shapes(*sizes)
    v_cache = {"v_cache": None} if "query_rope" in shapes else {}

    def decode(arguments):
        return decode_attention(**arguments, **v_cache, impl="tpu")

    memory = compile_for(chip, decode, shapes).memory_analysis()
    rope = 2 * 2 * np.prod(shapes["key_rope"].shape) if "key_rope" in shapes else 0
    one_layer = 2 * np.prod(shapes["k_cache"].shape[1:])
    assert memory.temp_size_in_bytes <= rope + one_layer / 8
