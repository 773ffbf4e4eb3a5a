"""Tuning: what is trained, what is frozen, and that both make the model they say, over structures of every kind."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.alignment import AdapterConfig, AdapterTargetConfig
from jaxllm.errors import InputError
from jaxllm.families import spec as published
from jaxllm.nn.model import apply, declarations, empty_cache
from jaxllm.nn.param import Initializer, abstract_values, decayed, initial_values, is_declared
from jaxllm.sharding.rules import RULES
from jaxllm.spec import Head, tiny
from jaxllm.train.forward import Forward
from jaxllm.train.tuning import FullTuning, make_tuning
from tests.tiny_models import LLAMA, TIED_LLAMA, make_batch, random_params
from tests.train.training_steps import torus_mesh

DEEPSEEK = tiny(published("deepseek-v2"), vocab_size=64)
QWEN = tiny(published("qwen-7b"), vocab_size=64)
LATENT = dataclasses.replace(DEEPSEEK, moe=None, num_layers=1)
GROUPED = tiny(published("llama2-70b"), vocab_size=64)
ROWS, LENGTH = 4, 8
TOKENS = np.random.default_rng(0).integers(0, 60, (ROWS, LENGTH))
KEYS = jax.random.key_data(jax.random.split(jax.random.key(3), ROWS))
BATCH = make_batch(
    TOKENS,
    segment_ids=[[1] * 5 + [2] * 3] * 3 + [[1] * 6 + [0] * 2],
    targets=jnp.asarray(np.roll(TOKENS, -1, axis=1), jnp.int32),
    loss_weights=jnp.ones(TOKENS.shape, jnp.float32).at[3, 5:].set(0),
)

logits_of = jax.jit(
    lambda spec, params, adapter, batch: apply(spec, params, batch, adapter=adapter).logits, static_argnums=0
)


def config(**options):
    return AdapterConfig(**{"rank": 3, "alpha": 5.0} | options)


def drawn(tuning, seed=0):
    """Return values of what is trained, none of them zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.value.shape) * 0.2, jnp.float32),
        tuning.trained(),
        is_leaf=is_declared,
    )


def check_declared(declared, values):
    """Check that values have the shapes and dtypes that their declarations say."""
    found = jax.tree.map(lambda value: (value.shape, value.dtype.name), values)
    assert found == jax.tree.map(lambda leaf: (leaf.value.shape, leaf.value.dtype.name), declared, is_leaf=is_declared)


@pytest.mark.parametrize(
    ("spec", "base", "targets"),
    [
        (LLAMA, "float32", ["head", "embedding", "attention", "mlp"]),
        (QWEN, "int8", ["c_attn", "mlp.c_proj"]),
        (DEEPSEEK, "nf4", []),
    ],
    ids=["llama", "qwen", "deepseek-v2"],
)
def test_a_merged_model_is_the_base_with_its_adapter(spec, base, targets):
    tuning = make_tuning(spec, config(base=base, targets=targets))
    nothing, frozen = jax.jit(tuning.split)(random_params(spec, scale=0.2))
    assert nothing is None
    check_declared(tuning.frozen(), frozen)
    trained = drawn(tuning)
    params, adapter = tuning.join(trained, frozen)
    merged = jax.jit(tuning.merge)(trained, frozen)
    check_declared(declarations(spec), merged)
    logits = logits_of(spec, params, adapter, BATCH)
    np.testing.assert_allclose(logits, logits_of(spec, merged, None, BATCH), atol=1e-5 * float(jnp.abs(logits).max()))
    assert np.abs(logits - logits_of(spec, params, None, BATCH)).max() > 0.01


def test_a_fresh_adapter_changes_nothing_and_starts_as_peft_starts():
    tuning, params = make_tuning(LLAMA, config(targets=["embedding", "q", "mlp"])), random_params(LLAMA)

    @jax.jit
    def start(params):
        _, frozen = tuning.split(params)
        fresh = initial_values(tuning.trained(), jax.random.key(0), Initializer())
        return fresh, tuning.merge(fresh, frozen)

    fresh, merged = start(params)
    check_declared(tuning.trained(), fresh)
    assert all(map(np.array_equal, jax.tree.leaves(merged), jax.tree.leaves(params)))
    a = fresh["layers"]["mlp"]["down"]["kernel"]["a"]
    assert 0.95 * 40**-0.5 < jnp.abs(a).max() <= 40**-0.5
    np.testing.assert_allclose(a.std(), (3 * 40) ** -0.5, rtol=0.1)


def test_matrices_of_one_published_tensor_share_their_first_factor():
    shared = make_tuning(QWEN, config(targets=["c_attn"])).trained()
    attention = shared["layers"]["attention"]
    assert [sorted(attention[name]["kernel"]) for name in "qkv"] == [["a", "b"], ["b"], ["b"]]
    apart = make_tuning(QWEN, config(targets=["q", "k", "v"])).trained()["layers"]["attention"]
    assert [sorted(apart[name]["kernel"]) for name in "qkv"] == [["a", "b"]] * 3
    both = make_tuning(QWEN, config(targets=["c_proj"])).trained()["layers"]
    assert sorted(both) == ["attention", "mlp"]
    assert all(jax.tree.leaves(decayed(shared)))


def test_last_layers_alone_are_adapted_and_scaled_by_target():
    options = dict(targets=["q", "down"], layers=2, rank_stabilized=True)
    tuning = make_tuning(LLAMA, config(per_target=[AdapterTargetConfig(name="down", rank=4)], **options))
    trained = drawn(tuning)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained)} == {2}
    _, adapter = tuning.join(trained, None)
    q, down = adapter["layers"]["attention"]["q"]["kernel"], adapter["layers"]["mlp"]["down"]["kernel"]
    assert (q.scale, down.scale) == (5 / 3**0.5, 5 / 4**0.5)
    assert (q.a[0] == 0).all() and (q.b[0] == 0).all()
    np.testing.assert_array_equal(down.b[1:], trained["layers"]["mlp"]["down"]["kernel"]["b"])
    assert list(make_tuning(DEEPSEEK, config(targets=["o"], layers=1)).trained()) == ["layers_1"]


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_parts_of_a_model_are_trained_and_join_to_the_whole(base):
    tuning = make_tuning(LLAMA, config(kind="partial", targets=["mlp", "head"], layers=2, base=base))
    params = random_params(LLAMA)
    trained, frozen = jax.jit(tuning.split)(params)
    check_declared(tuning.trained(), trained)
    check_declared(tuning.frozen(), frozen)
    assert sorted(trained) == ["head", "layers"]
    assert sorted(trained["layers"]) == ["mlp"]
    assert trained["layers"]["mlp"]["up"]["kernel"].shape == (2, 24, 40)
    assert frozen["layers"]["mlp"]["up"]["kernel"].shape == (1, 24, 40)
    assert "head" not in frozen
    joined, adapter = tuning.join(trained, frozen)
    assert adapter is None
    for path in ("mlp", "attention_norm"):
        found, wanted = (jax.tree.leaves(tree["layers"][path]) for tree in (joined, params))
        assert all(map(np.array_equal, found, wanted))
    whole = tuning.merge(trained, frozen)
    check_declared(declarations(LLAMA), whole)
    logits = logits_of(LLAMA, joined, None, BATCH)
    np.testing.assert_allclose(logits_of(LLAMA, whole, None, BATCH), logits, atol=1e-5)


def test_a_base_of_bfloat16_keeps_norms_and_embeddings():
    held = jax.tree_util.tree_leaves_with_path(make_tuning(LLAMA, config(base="bfloat16")).frozen(), is_declared)
    narrow = {"/".join(key.key for key in path) for path, leaf in held if leaf.value.dtype == jnp.bfloat16}
    attention = {f"layers/attention/{name}/kernel" for name in "qkvo"}
    assert narrow == attention | {f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")} | {"head"}


TUNINGS = {
    "lora on nf4": (QWEN, dict(base="nf4", targets=["c_attn"], dropout=0.25)),
    "lora on int8 experts": (DEEPSEEK, dict(base="int8", targets=["q_a", "kv_b_proj", "experts"])),
    "prefix network": (GROUPED, dict(kind="prefix", prefix_length=3, prefix_hidden=4)),
    "partial": (GROUPED, dict(kind="partial", targets=["mlp"], layers=1)),
}


def gradients_on(mesh, tuning, trained, frozen, *, staged):
    """Return the mean log-probability of the targets and its gradients, computed on a mesh."""
    forward = Forward(
        spec=tuning.spec,
        tuning=tuning,
        compute_dtype=jnp.dtype("float32"),
        remat="none",
        chunk=LENGTH,
        attention_impl="reference",
        staged=staged,
        dropout=0.1,
        neftune_alpha=3.0,
    )
    trained, frozen = (
        jax.tree.map(
            lambda value, leaf: jax.device_put(value, leaf.sharding), values, abstract_values(declared, mesh, None)
        )
        for values, declared in ((trained, tuning.trained()), (frozen, tuning.frozen()))
    )
    rows = jax.device_put((BATCH, KEYS), jax.sharding.NamedSharding(mesh, RULES.spec(("batch",))))

    @jax.jit
    def run(trained, frozen, rows):
        def loss(trained):
            return jnp.mean(forward.token_logps(trained, frozen, rows[0], train=True, row_keys=rows[1]))

        return jax.value_and_grad(loss)(trained)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        return run(trained, frozen, rows)


MESHES = {"xla": dict(fsdp_x=2, tensor=2), "staged": dict(fsdp_x=2, fsdp_y=2, tensor=2)}


@functools.cache
def on_one_device(name):
    """Return (tuning, what is trained, what is frozen, value, gradients)."""
    spec, options = TUNINGS[name]
    tuning = make_tuning(spec, config(**options))
    start, frozen = jax.jit(tuning.split)(random_params(spec, scale=0.2))
    trained = drawn(tuning) if start is None else start
    return tuning, trained, frozen, *gradients_on(torus_mesh(), tuning, trained, frozen, staged=False)


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "lora on nf4" else pytest.mark.slow) for name in TUNINGS]
)
def test_meshes_give_the_gradients_of_one_device(name, kind):
    tuning, trained, frozen, value, gradients = on_one_device(name)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-5
    mesh = torus_mesh(**MESHES[kind])
    on_many, gradients_on_many = gradients_on(mesh, tuning, trained, frozen, staged=kind == "staged")
    np.testing.assert_allclose(on_many, value, rtol=1e-5)
    found = jax.tree_util.tree_leaves_with_path(gradients_on_many)
    for (path, gradient), wanted in zip(found, jax.tree.leaves(gradients), strict=True):
        tolerance = 2e-5 * float(jnp.abs(wanted).max())
        np.testing.assert_allclose(gradient, wanted, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_rows_drop_the_same_in_every_batch():
    tuning = make_tuning(LLAMA, config(targets=["q", "down"], dropout=0.5))
    params, adapter = tuning.join(drawn(tuning), random_params(LLAMA))
    run = jax.jit(lambda batch, keys: apply(LLAMA, params, batch, adapter=adapter, train=True, row_keys=keys).logits)
    logits, order = run(BATCH, KEYS), np.array([2, 0])
    np.testing.assert_allclose(run(jax.tree.map(lambda x: x[order], BATCH), KEYS[order]), logits[order], atol=1e-5)
    assert np.abs(logits - run(BATCH, KEYS[::-1])).max() > 0.01
    assert np.abs(logits - logits_of(LLAMA, params, adapter, BATCH)).max() > 0.01


@pytest.mark.parametrize(
    ("spec", "options"),
    [(QWEN, dict(kind="prefix", prefix_length=3)), (LATENT, dict(targets=["attention"]))],
    ids=["prefix", "latent attention"],
)
def test_decoding_with_a_cache_is_the_full_forward(spec, options):
    tuning = make_tuning(spec, config(**options))
    params, adapter = tuning.join(drawn(tuning), random_params(spec, scale=0.2))
    batch = make_batch(TOKENS[:2])
    whole = logits_of(spec, params, adapter, batch)
    step = jax.jit(lambda batch, cache: apply(spec, params, batch, adapter=adapter, cache=cache))
    cache = empty_cache(spec, 2, LENGTH, jnp.float32)
    for start, stop in ((0, 7), (7, 8)):
        output = step(jax.tree.map(lambda x, part=slice(start, stop): x[:, part], batch), cache)
        cache = output.cache
        np.testing.assert_allclose(output.logits, whole[:, start:stop], atol=1e-4)
    assert np.abs(whole - logits_of(spec, params, None, batch)).max() > 0.01


def test_what_does_not_fit_a_model_is_refused():
    for spec, options, message in (
        (LLAMA, dict(targets=["c_attn"]), "adapter.targets: 'c_attn' names no matrix of this model; expected some of"),
        (LLAMA, dict(targets=["router"]), "'router' names no matrix"),
        (LLAMA, dict(targets=["mlp", "gate"]), "layers/mlp/gate/kernel is named twice"),
        (LLAMA, dict(targets=["head"], dropout=0.1), "adapter.dropout: head can be adapted only without dropout"),
        (DEEPSEEK, dict(dropout=0.1), "adapter.dropout: layers_1/mlp/experts"),
        (DEEPSEEK, dict(kind="prefix"), "latent attention"),
        (LLAMA, dict(kind="partial"), "kind 'partial' needs the names"),
        (dataclasses.replace(LLAMA, head=Head(normalized=True)), dict(targets=["head"]), "head of this model is norm"),
        (TIED_LLAMA, dict(targets=["embedding"]), "embedding of this model is its head too"),
        (TIED_LLAMA, dict(targets=["head"]), "'head' names no matrix"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            make_tuning(spec, config(**options))
    prefix = make_tuning(LLAMA, config(kind="prefix", prefix_length=2))
    with pytest.raises(InputError, match="a prefix cannot be merged"):
        prefix.merge(drawn(prefix), None)


def test_full_tuning_is_the_model_itself():
    params = random_params(LLAMA)
    tuning = make_tuning(LLAMA, None)
    assert isinstance(tuning, FullTuning)
    assert tuning.split(params) == (params, None)
    assert tuning.join(params, None) == (params, None)
    assert tuning.merge(params, None) is params
    assert tuning.frozen() is None
