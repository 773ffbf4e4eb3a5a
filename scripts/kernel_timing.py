"""Times of attention on the device that is there: ours, jax's own kernels and, on a GPU, cuDNN's, in one run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxllm.train.flops import peak_flops
from kernels_pallas.flash_attention import flash_attention

LENGTHS = (4096, 8192, 16384)
HEADS, HEAD_DIM = 16, 128
_TOKENS = 16384
_ROUNDS, _CALLS = 5, 4


def implementations(platform: str) -> dict[str, Callable]:
    """Return causal attentions of [B, T, N, H] arrays by name, those of a "tpu" or a "gpu"."""
    ours = {"jaxllm": functools.partial(flash_attention, impl=platform)}
    if platform == "tpu":
        return ours | {"jax flash": _jax_flash, "jax splash": _jax_splash}
    return ours | {
        "cuDNN": functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"),
        "XLA": functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla"),
    }


def _heads_first(attend: Callable) -> Callable:
    """Let an attention of [B, N, T, H] arrays take [B, T, N, H]: models pay for that, too."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.swapaxes(attend(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v))), 1, 2)

    return run


@_heads_first
def _jax_flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    block = min(1024, q.shape[2])
    names = [field for field in library.BlockSizes.__dataclass_fields__ if field != "block_b"]
    sizes = library.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    return library.flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes)


@_heads_first
def _jax_splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length, block = q.shape[2], min(1024, q.shape[2])
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block // 2,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block // 2,
        use_fused_bwd_kernel=True,
    )
    mask = library.MultiHeadMask([library.CausalMask((length, length))] * q.shape[1])
    kernel = library.make_splash_mha_single_device(mask, block_sizes=sizes)
    return jax.vmap(kernel)(q * q.shape[-1] ** -0.5, k, v)


def timings(lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict]:
    """Yield the time of each implementation, length and pass on the default device; every pass has 16k tokens.

    FLOPs are those of causal attention: 2 products forward and 5 backward over half of the pairs. An implementation
    that does not run here has an `error` in place of its times.
    """
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    for length in lengths:
        shape = (max(1, _TOKENS // length), length, HEADS, HEAD_DIM)
        arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)]
        forward_flops = shape[0] * HEADS * length**2 * HEAD_DIM * 2
        for name, attend in implementations("tpu" if device.platform == "tpu" else "gpu").items():
            row = {"device": device.device_kind, "implementation": name, "length": length}
            try:
                forward, both = _seconds(attend, arrays)
            except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
                yield row | {"error": str(error).partition("\n")[0]}
                continue
            for part, seconds, flops in (("forward", forward, 1.0), ("backward", both - forward, 2.5)):
                rate = flops * forward_flops / seconds
                figures = {"pass": part, "milliseconds": seconds * 1e3, "tflops": rate / 1e12}
                yield row | figures | ({} if peak is None else {"of_peak": rate / peak})


def _seconds(attend: Callable, arrays: list[jax.Array]) -> tuple[float, float]:
    """Return the median seconds of the forward pass, and of forward and backward together."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple:
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    return _median(jax.jit(attend), arrays[:3]), _median(jax.jit(both), arrays)


def _median(function: Callable, inputs: list[jax.Array]) -> float:
    jax.block_until_ready(function(*inputs))
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready([function(*inputs) for _ in range(_CALLS)])
        seconds.append((time.perf_counter() - begin) / _CALLS)
    return statistics.median(seconds)
