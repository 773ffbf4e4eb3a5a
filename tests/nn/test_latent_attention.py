"""Latent attention against a plain loop in float64, and its two ways to attend against each other."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.nn.attention import AttentionContext, LayerCache
from jaxllm.nn.dot_product import Visibility
from jaxllm.nn.latent_attention import LatentAttention, softmax_scale
from jaxllm.nn.model import declarations, empty_cache
from jaxllm.nn.param import is_declared
from jaxllm.nn.position import rope_tables
from jaxllm.spec import MLA, MLP, ModelSpec, Norm, Rope, Yarn

ROWS, LENGTH, WIDTH, HEADS = 2, 9, 20, 3
NOPE, TURNED, VALUE, LATENT = 6, 4, 5, 7
YARN = Yarn(factor=8.0, original_max_position=16, mscale=1.3, mscale_all_dim=0.8)
DIRECT = ModelSpec(
    vocab_size=16,
    hidden_size=WIDTH,
    num_layers=2,
    max_position_embeddings=128,
    attention=MLA(
        num_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=TURNED,
        v_head_dim=VALUE,
    ),
    position=Rope(layout="interleaved"),
    mlp=MLP(intermediate_size=8),
    norm=Norm(eps=0.3),
)
COMPRESSED = dataclasses.replace(
    DIRECT,
    attention=dataclasses.replace(DIRECT.attention, q_lora_rank=8, bias=True),
    position=Rope(layout="interleaved", scaling=YARN),
)
SPECS = {"queries straight": DIRECT, "queries compressed, biases, YaRN": COMPRESSED}


def layer_params(spec):
    """Return random parameters of one layer's attention."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.value.shape[1:]) * 0.4 + (leaf.kind == "ones"), jnp.float32)

    return jax.tree.map(draw, declarations(spec)["layers"]["attention"], is_leaf=is_declared)


def context_of(spec, slots, num_keys, index=None):
    positions = jnp.broadcast_to(jnp.asarray(slots), (ROWS, len(slots)))
    length = jnp.full(ROWS, num_keys)
    return AttentionContext(
        rope=rope_tables(spec.position, positions, spec.rotary_dim, length=length, train=False),
        key_rope=None,
        visibility=Visibility(
            segment_ids=jnp.ones((ROWS, len(slots)), jnp.int32),
            key_segment_ids=jnp.ones((ROWS, num_keys), jnp.int32),
            start=jnp.int32(slots[0]),
            prefix=None,
            mask=None,
        ),
        alibi_slopes=None,
        query_scale=None,
        index=index,
    )


@functools.partial(jax.jit, static_argnums=0)
def attend(spec, params, x, context, cache=None, layer=0):
    return LatentAttention(spec).apply({"params": params}, x, context, layer, None, cache)


def expected_attention(spec, params, x):
    """Compute one row [T, D] by the paper's equations 9 to 19, with every head's keys and values expanded."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    frequencies = 10_000.0 ** (-np.arange(TURNED // 2) / (TURNED // 2))
    temperature, ratio = 1.0, 1.0
    if spec.position.scaling is not None:
        rotations = YARN.original_max_position * frequencies / (2 * math.pi)
        # With 16 original positions the ramp runs between the dimensions of 32 and of 1 rotation: 0 and 1.
        assert rotations[0] > 1 > rotations[1]
        frequencies = np.array([frequencies[0], frequencies[1] / YARN.factor])
        temperature, other = (0.1 * m * math.log(YARN.factor) + 1 for m in (YARN.mscale_all_dim, YARN.mscale))
        ratio = other / temperature

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * scale

    def through(x, name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

    def turn(x):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * ratio
        pairs = pairs * np.exp(1j * np.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1)) * frequencies)
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    queries = x if spec.attention.q_lora_rank is None else norm(through(x, "q_a"), params["q_norm"]["scale"])
    q = np.einsum("td,dnh->tnh", queries, params["q"]["kernel"])
    q = np.concatenate([q[..., :NOPE], turn(q[..., NOPE:])], axis=-1)
    latent = norm(through(x, "kv_a"), params["kv_norm"]["scale"])
    k_rope = turn(through(x, "k_rope"))
    output = np.zeros((len(x), WIDTH))
    for t, head in np.ndindex(len(x), HEADS):
        keys = np.concatenate([latent[: t + 1] @ params["k_b"][:, head], k_rope[: t + 1]], axis=-1)
        scores = keys @ q[t, head] / math.sqrt(NOPE + TURNED) * temperature**2
        weights = np.exp(scores - scores.max())
        seen = weights / weights.sum() @ (latent[: t + 1] @ params["v_b"][:, head])
        output[t] += seen @ params["o"]["kernel"][head]
    return output + params["o"].get("bias", 0.0)


@pytest.fixture(scope="module", params=SPECS)
def case(request):
    spec = SPECS[request.param]
    x = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    return spec, layer_params(spec), x


def test_it_is_the_papers_attention_with_expanded_heads(case):
    spec, params, x = case
    y, cache = attend(spec, params, x, context_of(spec, np.arange(LENGTH), LENGTH))
    assert cache is None
    for row in range(ROWS):
        np.testing.assert_allclose(y[row], expected_attention(spec, params, x[row]), atol=2e-5)


def test_single_tokens_attend_in_the_latent_space_to_the_same_effect(case):
    spec, params, x = case
    whole, _ = attend(spec, params, x, context_of(spec, np.arange(LENGTH), LENGTH))
    slots = empty_cache(spec, ROWS, LENGTH + 3, jnp.float32)
    assert slots.k.shape == (2, ROWS, LENGTH + 3, 1, LATENT)
    assert slots.v.shape == (2, ROWS, LENGTH + 3, 1, TURNED)
    cache, first = LayerCache(k=slots.k, v=slots.v), 4
    prompt = context_of(spec, np.arange(first), LENGTH + 3, jnp.int32(0))
    y, cache = attend(spec, params, x[:, :first], prompt, cache, layer=1)
    np.testing.assert_allclose(y, whole[:, :first], atol=2e-5)
    for slot in range(first, LENGTH):
        step = context_of(spec, np.array([slot]), LENGTH + 3, jnp.int32(slot))
        y, cache = attend(spec, params, x[:, slot : slot + 1], step, cache, layer=1)
        np.testing.assert_allclose(y[:, 0], whole[:, slot], atol=2e-5)
    assert (np.asarray(cache.k[0]) == 0).all(), "another layer's cache was written to"
    assert (np.asarray(cache.k[1, :, LENGTH:]) == 0).all()


def test_the_published_softmax_scale():
    """arXiv:2405.04434's model: 192^-1/2 (0.1 * 0.707 ln 40 + 1)^2."""
    attention = dataclasses.replace(DIRECT.attention, qk_nope_head_dim=128, qk_rope_head_dim=64)
    yarn = Yarn(factor=40.0, original_max_position=4096, mscale=0.707, mscale_all_dim=0.707)
    spec = dataclasses.replace(DIRECT, attention=attention, position=Rope(layout="interleaved", scaling=yarn))
    assert softmax_scale(spec) == pytest.approx(0.11472, abs=1e-5)
    plain = dataclasses.replace(yarn, mscale_all_dim=0.0)
    for scaling in (plain, None):
        position = Rope(layout="interleaved", scaling=scaling)
        assert softmax_scale(dataclasses.replace(spec, position=position)) == 192**-0.5
