"""The decoder against an independent float64 implementation, and its laws: packing, padding, masks, remat, dtypes."""

import dataclasses
import json
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.families.keymap import expand, set_path
from jaxllm.families.llama import LLAMA as LLAMA_FAMILY
from jaxllm.nn.decoder import REMAT_POLICIES
from jaxllm.nn.model import apply
from jaxllm.spec import GQA, MLP, ChunkedNTK, DynamicNTK, LinearScaling, ModelSpec, Norm, Rope
from tests.tiny_models import LLAMA, QWEN, TIED_LLAMA, WINDOWED_QWEN, make_batch, random_params

ROWS, LENGTH = 2, 14
TOKENS = np.random.default_rng(1).integers(0, LLAMA.vocab_size, (ROWS, LENGTH))
CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))


def oracle(spec, params, row, *, positions=None, allowed=CAUSAL, rope_length=None, train=False):
    """Compute the logits [T, V] of one row of ids [T] in plain float64 numpy; allowed bool [T, T]."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    attention, scaling, theta = spec.attention, spec.position.scaling, spec.position.theta
    length = len(row) if rope_length is None else rope_length
    positions = np.arange(len(row)) if positions is None else positions
    half = attention.head_dim // 2
    angle_positions = positions / scaling.factor if isinstance(scaling, LinearScaling) else positions
    power = attention.head_dim / (attention.head_dim - 2)
    if isinstance(scaling, ChunkedNTK) and not train:
        theta *= max(2 ** math.ceil(math.log2(length / scaling.train_length) + 1) - 1, 1) ** power
    if isinstance(scaling, DynamicNTK) and length > scaling.original_max_position:
        theta *= (scaling.factor * length / scaling.original_max_position - (scaling.factor - 1)) ** power
    turn = np.exp(1j * angle_positions[:, None] * theta ** (-np.arange(half) / half))
    logn = np.ones(len(row))
    if spec.logn is not None and not train:
        logn = np.array([max(1.0, math.log(p + 1, spec.logn.train_length)) for p in positions])

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + spec.norm.eps) * scale

    def heads(x, weights):
        return np.einsum("td,dnh->tnh", x, weights["kernel"]) + weights.get("bias", 0.0)

    def rotate(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = params["embedding"][row]
    for layer in range(spec.num_layers):
        weights = jax.tree.map(operator.itemgetter(layer), params["layers"])
        normed = norm(x, weights["attention_norm"]["scale"])
        q, k = (rotate(heads(normed, weights["attention"][name])) for name in "qk")
        v = heads(normed, weights["attention"]["v"])
        visible = allowed
        if spec.window is not None and spec.window[layer] is not None:
            distance = np.arange(len(row))[:, None] - np.arange(len(row))[None]
            visible = allowed & (distance < spec.window[layer])
        mixed = np.zeros(q.shape)
        for t, n in np.ndindex(q.shape[:2]):
            seen = np.flatnonzero(visible[t])
            if seen.size:
                group = n * attention.num_kv_heads // attention.num_heads
                scores = k[seen, group] @ q[t, n] * logn[t] / math.sqrt(attention.head_dim)
                scores = np.exp(scores - scores.max())
                mixed[t, n] = scores / scores.sum() @ v[seen, group]
        output = weights["attention"]["o"]
        x = x + np.einsum("tnh,nhd->td", mixed, output["kernel"]) + output.get("bias", 0.0)
        normed, mlp = norm(x, weights["mlp_norm"]["scale"]), weights["mlp"]
        gate, up = (normed @ mlp[name]["kernel"] + mlp[name].get("bias", 0.0) for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["kernel"] + mlp["down"].get("bias", 0.0)
    head = params["embedding"].T if spec.head.tie_word_embeddings else params["head"]
    return norm(x, params["final_norm"]["scale"]) @ head


logits_of = jax.jit(lambda spec, params, batch, train=False: apply(spec, params, batch, train=train).logits,
                    static_argnums=(0, 3))  # fmt: skip
PARAMS = {spec: random_params(spec) for spec in (LLAMA, TIED_LLAMA, QWEN, WINDOWED_QWEN)}
LONG_LLAMA = dataclasses.replace(
    TIED_LLAMA, position=Rope(scaling=DynamicNTK(factor=2.0, original_max_position=5)), window=(None, 3, 1)
)


@pytest.mark.parametrize(
    ("spec", "train"),
    [(WINDOWED_QWEN, False), (WINDOWED_QWEN, True), (LONG_LLAMA, False), (LLAMA, False)],
    ids=["windowed-qwen", "windowed-qwen-train", "windowed-dynamic-tied-llama", "llama"],
)
def test_logits_match_plain_numpy(spec, train):
    params = random_params(spec)
    logits = logits_of(spec, params, make_batch(TOKENS), train)
    assert logits.dtype == jnp.float32
    for row in range(ROWS):
        np.testing.assert_allclose(logits[row], oracle(spec, params, TOKENS[row], train=train), atol=2e-4)


def test_every_rule_of_the_windowed_model_counts():
    params = PARAMS[WINDOWED_QWEN]
    full = oracle(WINDOWED_QWEN, params, TOKENS[0])
    plainer = [
        dataclasses.replace(WINDOWED_QWEN, window=None),
        dataclasses.replace(WINDOWED_QWEN, window=(None, 2, 5)),
        dataclasses.replace(WINDOWED_QWEN, logn=None),
        dataclasses.replace(WINDOWED_QWEN, position=Rope()),
    ]
    for spec in plainer:
        assert np.abs(oracle(spec, params, TOKENS[0]) - full).max() > 0.01


def test_gradients_match_finite_differences_of_the_oracle():
    spec, params = WINDOWED_QWEN, PARAMS[WINDOWED_QWEN]
    weights = np.random.default_rng(2).normal(size=(ROWS, LENGTH, spec.vocab_size))

    def objective(params):
        return jnp.sum(apply(spec, params, make_batch(TOKENS), remat="full").logits * weights)

    def exact(params):
        return sum(np.sum(oracle(spec, params, TOKENS[row]) * weights[row]) for row in range(ROWS))

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(objective))(params))
    rng, step = np.random.default_rng(3), 1e-5
    for path, gradient in gradients:
        place = tuple(int(rng.integers(size)) for size in gradient.shape)
        if path[0].key == "embedding":
            place = (int(TOKENS[1, 4]), place[1])

        def moved(by, path=path, place=place):
            values = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params)
            node = values
            for key in path[:-1]:
                node = node[key.key]
            node[path[-1].key][place] += by
            return exact(values)

        expected = (moved(step) - moved(-step)) / (2 * step)
        scale = float(np.abs(gradient).max())
        assert abs(float(gradient[place]) - expected) < 2e-4 * scale, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def packed_golden(goldens):
    arrays = np.load(goldens / "packed_tiny_llama.npz")
    config = json.loads(str(arrays["config"]))
    spec = ModelSpec(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        max_position_embeddings=64,
        attention=GQA(num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"], head_dim=8),
        position=Rope(theta=config["rope_theta"]),
        mlp=MLP(intermediate_size=config["intermediate_size"]),
        norm=Norm(eps=config["rms_norm_eps"]),
    )
    params, layers = {}, {}
    for name, (key, place) in expand(LLAMA_FAMILY.keys(spec), spec.num_layers).items():
        for path, part in zip(key.paths, key.op.to_jax(arrays["param_" + name.replace(".", "/")]), strict=True):
            if place:
                layers.setdefault(path, []).append(part)
            else:
                set_path(params, path, part)
    for path, parts in layers.items():
        set_path(params, path, np.stack(parts))
    return spec, params, arrays


def test_packed_documents_match_the_golden(packed_golden):
    spec, params, arrays = packed_golden
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    batch = make_batch(arrays["input_ids"], arrays["segment_ids"][None] + 1, arrays["position_ids"])
    packed = logits_of(spec, params, batch)[0]
    np.testing.assert_allclose(packed, arrays["logits_blockdiag"], atol=1e-5)
    naive = logits_of(spec, params, make_batch(arrays["input_ids"]))[0]
    np.testing.assert_allclose(naive, arrays["logits_naive_causal"], atol=1e-5)
    assert np.abs(packed - naive).max() > 0.01


def test_packed_documents_match_the_golden_in_float64(packed_golden):
    spec, params, arrays = packed_golden
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        batch = make_batch(arrays["input_ids"], arrays["segment_ids"][None] + 1, arrays["position_ids"])
        packed = logits_of(spec, params, batch)[0]
        assert packed.dtype == jnp.float64
        # The reference's norms and our rotation angles are float32: about 1e-6 is what both allow.
        np.testing.assert_allclose(packed, arrays["logits_blockdiag"], atol=2e-6)


@pytest.mark.parametrize("spec", [WINDOWED_QWEN, LLAMA], ids=["windowed-qwen", "llama"])
def test_packed_rows_equal_documents_apart(spec):
    pieces = [4, 7, 3]
    segments = np.repeat([1, 2, 3], pieces)[None].repeat(ROWS, axis=0)
    positions = np.concatenate([np.arange(size) for size in pieces])[None].repeat(ROWS, axis=0)
    train = spec is WINDOWED_QWEN  # its length rules are off in training, where rows are packed
    packed = np.asarray(logits_of(spec, PARAMS[spec], make_batch(TOKENS, segments, positions), train))
    for segment, size in enumerate(pieces, 1):
        inside = segments[0] == segment
        apart, valid = np.zeros_like(TOKENS), np.zeros_like(TOKENS)
        apart[:, :size], valid[:, :size] = TOKENS[:, inside], 1
        alone = np.asarray(logits_of(spec, PARAMS[spec], make_batch(apart, valid), train))
        np.testing.assert_allclose(packed[:, inside], alone[:, :size], atol=5e-5)


def test_logn_counts_positions_within_a_packed_document():
    spec = dataclasses.replace(QWEN, position=Rope())
    segments, positions = np.repeat([1, 2], 7)[None], np.tile(np.arange(7), 2)[None]
    allowed = CAUSAL & (segments[0][:, None] == segments[0][None])
    batch = make_batch(TOKENS, segments.repeat(ROWS, axis=0), positions.repeat(ROWS, axis=0))
    expected = oracle(spec, PARAMS[QWEN], TOKENS[0], positions=positions[0], allowed=allowed)
    np.testing.assert_allclose(logits_of(spec, PARAMS[QWEN], batch)[0], expected, atol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    pad, size = 5, LENGTH - 5
    padded, valid = np.full_like(TOKENS, 7), np.zeros_like(TOKENS)
    inside = slice(pad, None) if side == "left" else slice(0, size)
    padded[:, inside], valid[:, inside] = TOKENS[:, :size], 1
    plain = np.asarray(logits_of(LLAMA, PARAMS[LLAMA], make_batch(TOKENS)))[:, :size]
    logits = np.asarray(logits_of(LLAMA, PARAMS[LLAMA], make_batch(padded, valid)))
    np.testing.assert_allclose(logits[:, inside], plain, atol=5e-5)
    other = np.where(valid == 0, 3, padded)
    again = np.asarray(logits_of(LLAMA, PARAMS[LLAMA], make_batch(other, valid)))
    np.testing.assert_array_equal(again[:, inside], logits[:, inside])


def test_an_explicit_mask_replaces_the_causal_rule_but_not_padding():
    allowed = np.random.default_rng(4).random((ROWS, LENGTH, LENGTH)) < 0.4
    allowed[:, 6] = False
    valid = np.ones_like(TOKENS)
    valid[:, -3:] = 0
    logits = logits_of(LLAMA, PARAMS[LLAMA], make_batch(TOKENS, valid, mask=jnp.asarray(allowed)))
    assert np.isfinite(logits).all()
    for row in range(ROWS):
        expected = oracle(LLAMA, PARAMS[LLAMA], TOKENS[row], allowed=allowed[row] & (valid[row] != 0))
        np.testing.assert_allclose(logits[row], expected, atol=2e-4)
    causal = make_batch(TOKENS, mask=jnp.broadcast_to(CAUSAL, allowed.shape))
    plain = logits_of(LLAMA, PARAMS[LLAMA], make_batch(TOKENS))
    np.testing.assert_array_equal(logits_of(LLAMA, PARAMS[LLAMA], causal), plain)


def test_bfloat16_compute_keeps_float32_logits_near_the_exact_ones():
    batch, params = make_batch(TOKENS), PARAMS[LLAMA]
    output = jax.jit(lambda params: apply(LLAMA, params, batch, compute_dtype=jnp.bfloat16))(params)
    assert (output.hidden.dtype, output.logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.stack([oracle(LLAMA, params, row) for row in TOKENS])
    error = np.abs(output.logits - exact)
    assert error.mean() < 0.04 * np.abs(exact).mean()
    rounded = np.asarray(output.logits.astype(jnp.bfloat16).astype(jnp.float32))
    assert (rounded != output.logits).any(), "logits were rounded to bfloat16"


def remat_gradients(remat):
    def objective(params):
        return jnp.sum(jnp.sin(apply(LLAMA, params, make_batch(TOKENS), remat=remat).logits))

    return jax.jit(jax.grad(objective))(PARAMS[LLAMA])


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_rematerialisation_changes_no_gradient(remat):
    plain, again = remat_gradients("none"), remat_gradients(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max())), plain, again)


def test_one_layer_with_biases_everywhere():
    attention = dataclasses.replace(LLAMA.attention, qkv_bias=True, out_bias=True)
    mlp = dataclasses.replace(LLAMA.mlp, bias=True)
    spec = dataclasses.replace(LLAMA, num_layers=1, attention=attention, mlp=mlp)
    params = random_params(spec)
    np.testing.assert_allclose(
        logits_of(spec, params, make_batch(TOKENS))[0], oracle(spec, params, TOKENS[0]), atol=2e-4
    )
