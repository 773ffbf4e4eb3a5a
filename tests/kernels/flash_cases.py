"""Masks, shapes and dtypes that flash attention is tested with, whichever the implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_numpy import attention
from hypothesis import strategies as st

from kernels_pallas import reference
from kernels_pallas.flash_attention import flash_attention

LENGTH = 150
"""No multiple of any block of the tests."""

SEGMENTS = np.array(
    [
        np.repeat([1, 2, 3, 0], [30, 70, 41, 9]),
        np.repeat([0, 4, 5, 7], [5, 60, 60, 25]),
    ],
    np.int32,
)
UNSORTED = np.array([np.repeat([3, 1, 3, 2, 0], 30), np.arange(LENGTH) % 3], np.int32)
PREFIX = np.zeros((2, LENGTH), bool)
PREFIX[0, 0:12] = PREFIX[0, 30:66] = PREFIX[1, 5:90] = PREFIX[1, 145:] = True
NO_PREFIX = np.zeros_like(PREFIX)
LOG_N = np.linspace(1.0, 1.7, 2 * LENGTH, dtype=np.float32).reshape(2, LENGTH)
ANY_SCALE = LOG_N * np.resize(np.array([1, 0, -1], np.float32), LOG_N.shape)
SLOPES = np.array([0.3, 0.1, 0.03, 0.01], np.float32)


def masked(segments=SEGMENTS, prefix=NO_PREFIX, window=LENGTH):
    """Return a case with all parts of a mask: all of them share one compiled program."""
    return {"segment_ids": segments, "prefix_mask": prefix, "window": np.int32(window)}


CASES = {
    "causal": {},
    "all": {"causal": False, "alibi_slopes": SLOPES},
    "segments": masked(),
    "segments in any order": masked(UNSORTED),
    "window": masked(window=41),
    "prefix": masked(prefix=PREFIX),
    "prefix beyond the window": masked(prefix=PREFIX, window=25),
    "nobody": masked(np.zeros_like(SEGMENTS)),
    "window of nothing": masked(window=0),
    "window, not causal": {"causal": False, "window": np.int32(30), "query_scale": LOG_N},
    "scales of any sign": {**masked(window=41), "query_scale": ANY_SCALE},
    "everything": {
        **masked(prefix=PREFIX, window=25),
        "alibi_slopes": SLOPES,
        "query_scale": LOG_N,
        "soft_cap": 3.0,
        "softmax_scale": 0.4,
    },
}


@st.composite
def packed_rows(choose):
    """Draw two rows of documents, a part of each of them a prefix, padding between and after them, and a window."""
    segments, prefix = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), bool)
    for row in range(2):
        start, number = 0, 0
        while start < LENGTH:
            length = choose(st.integers(1, 90))
            number += 1
            stop = min(start + length, LENGTH)
            segments[row, start:stop] = number * choose(st.sampled_from([0, 1, 1, 1]))
            prefix[row, start : min(start + choose(st.integers(0, length)), stop)] = True
            start = stop
    return masked(segments, prefix, choose(st.one_of(st.just(LENGTH), st.integers(0, LENGTH))))


STATIC = ("causal", "softmax_scale", "soft_cap")


def draw(seed, length=LENGTH, slots=None, heads=(4, 2), dims=(24, 16), dtype=jnp.float32):
    """Return (q, k, v, do, dlse): normal draws for two rows; heads (N, K), dims (H, Hv)."""
    rng = np.random.default_rng(seed)
    slots = length if slots is None else slots
    shapes = (
        (2, length, heads[0], dims[0]),
        (2, slots, heads[1], dims[0]),
        (2, slots, heads[1], dims[1]),
        (2, length, heads[0], dims[1]),
    )
    dlse = jnp.asarray(rng.normal(size=(2, heads[0], length)), jnp.float32)
    return *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), dlse


def run(arrays, case, attend=flash_attention, **options):
    """Return {"o", "lse", "dq", "dk", "dv", "dquery_scale" (None without query_scale)}, by one compiled call."""
    static = {name: x for name, x in case.items() if name in STATIC} | options
    data = {name: x for name, x in case.items() if name not in STATIC}
    return _compute(attend, tuple(static.items()), arrays, data)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compute(attend, static, arrays, data):
    q, k, v, do, dlse = arrays
    data = dict(data)
    query_scale = data.pop("query_scale", None)

    def forward(q, k, v, query_scale):
        return attend(q, k, v, query_scale=query_scale, return_lse=True, **data, **dict(static))

    (o, lse), pull = jax.vjp(forward, q, k, v, query_scale)
    gradients = pull((do.astype(o.dtype), dlse.astype(lse.dtype)))
    return {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv", "dquery_scale"), gradients, strict=True))


def expected(arrays, case):
    return attention(*(np.asarray(x, np.float64) for x in arrays), **case)


def errors(found, wanted):
    """Return each array's largest difference, relative to the largest number expected in it."""
    result = {}
    for name, x in found.items():
        if x is None:
            continue
        x, reference = np.asarray(x, np.float64), wanted[name]
        assert np.isfinite(x).all(), name
        if name == "lse":
            dead = np.isneginf(reference)
            assert (x[dead] < -1e29).all()
            x, reference = x[~dead], reference[~dead]
        result[name] = np.abs(x - reference).max(initial=0) / max(np.abs(reference).max(initial=0), 1e-30)
    return result


def check(found, wanted, forward=2e-6, backward=2e-5):
    late = {
        name: error
        for name, error in errors(found, wanted).items()
        if error > (forward if name in ("o", "lse") else backward)
    }
    assert not late, late


def check_bfloat16(arrays, case, **options):
    """Hold a kernel's bfloat16 errors to the reference's, and its scores, of which the lse tells, to float32's."""
    wanted = expected(arrays, case)
    ours = errors(run(arrays, case, **options), wanted)
    theirs = errors(run(arrays, case, attend=reference.flash_attention), wanted)
    bounds = {name: 2e-6 if name == "lse" else 1.5 * theirs[name] + _unit(wanted[name]) for name in ours}
    late = {name: (error, theirs[name]) for name, error in ours.items() if error > bounds[name]}
    assert not late, late


def _unit(x):
    """Return a unit in the last place of bfloat16 of the largest number, relative to it."""
    largest = np.abs(x).max()
    return float(np.spacing(largest.astype(jnp.bfloat16))) / max(largest, 1e-30)
