"""The limit that bench_train.py is held against: the same step written by hand, with nothing but jax and optax.

Llama style, 4 layers, hidden 256, 8 heads, feed-forward 688, vocabulary 8192, rows of 256 tokens, 8 rows a step,
float32, AdamW, layers scanned and rematerialised, q/k/v and gate/up fused. Prints one JSON line.
"""

from __future__ import annotations

import bench_report
import jax
import jax.numpy as jnp
import numpy as np
import optax

bench = bench_report.Bench("limit")

S = bench_report.SHAPE
L, D, N, H, F, V, T, B = (
    S[key] for key in ("layers", "hidden", "heads", "head_dim", "mlp", "vocab", "length", "batch")
)


def init(key):
    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.float32) * 0.02

    keys = jax.random.split(key, 6)
    layers = {
        "attention_norm": jnp.ones((L, D)),
        "mlp_norm": jnp.ones((L, D)),
        "qkv": normal(keys[0], L, D, 3 * D),
        "out": normal(keys[1], L, D, D),
        "gate_up": normal(keys[2], L, D, 2 * F),
        "down": normal(keys[3], L, F, D),
    }
    return {"embedding": normal(keys[4], V, D), "head": normal(keys[5], D, V), "norm": jnp.ones(D), "layers": layers}


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


angles = np.arange(T)[:, None] / 10_000.0 ** (np.arange(0, H, 2) / H)
COS, SIN = (f(angles).astype(np.float32)[None, :, None] for f in (np.cos, np.sin))
MASK = np.where(np.tril(np.ones((T, T), bool)), 0, -1e9).astype(np.float32)


def rope(x):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * COS - b * SIN, b * COS + a * SIN], -1)


def matmul(x, w):
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)


@jax.checkpoint
def layer(x, w):
    q, k, v = (a.reshape(B, T, N, H) for a in jnp.split(matmul(rms_norm(x, w["attention_norm"]), w["qkv"]), 3, -1))
    scores = jnp.einsum("bqnh,bknh->bnqk", rope(q), rope(k)) * H**-0.5 + MASK
    attended = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, -1), v)
    x = x + matmul(attended.reshape(B, T, D), w["out"])
    gate, up = jnp.split(matmul(rms_norm(x, w["mlp_norm"]), w["gate_up"]), 2, -1)
    return x + matmul(jax.nn.silu(gate) * up, w["down"]), None


def loss(params, tokens):
    x, _ = jax.lax.scan(layer, params["embedding"][tokens[:, :-1]], params["layers"])
    logits = rms_norm(x, params["norm"]).reshape(-1, D) @ params["head"]
    picked = jnp.take_along_axis(logits, tokens[:, 1:].reshape(-1, 1), -1)[:, 0]
    return (jax.nn.logsumexp(logits, -1) - picked).mean()


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1))


def step(params, opt_state, tokens):
    value, gradients = jax.value_and_grad(loss)(params, tokens)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def make(key):
    params = init(key)
    return params, optimizer.init(params)


state = jax.jit(make)(jax.random.key(0))
compiled = jax.jit(step, donate_argnums=(0, 1))


def one_step(rows):
    global state
    params, opt_state, value = compiled(*state, rows)
    state = params, opt_state
    return float(value)


bench.run(one_step, bench_report.random_rows())
