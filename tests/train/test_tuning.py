"""Tuning: what is trained, what is frozen, and that both make the model they say, over structures of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.alignment import AdapterConfig
from jaxllm.families import spec as published
from jaxllm.nn.model import apply, declarations
from jaxllm.nn.param import is_declared
from jaxllm.spec import tiny
from jaxllm.train.tuning import make_tuning
from tests.tiny_models import LLAMA, make_batch, random_params

DEEPSEEK = tiny(published("deepseek-v2"), vocab_size=64, num_layers=3)
QWEN = tiny(published("qwen-7b"), vocab_size=64)
GLM = tiny(published("chatglm2-6b"), vocab_size=64)
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


def paths(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


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
    for kind, options in (("lora", {"targets": ["embedding", "q", "mlp"]}), ("partial", {"targets": ["mlp"]})):
        tuning = make_tuning(LLAMA, config(kind=kind, **options))
        params = random_params(LLAMA)
        start, frozen = tuning.split(params)
        fresh = initial_values(tuning.trained(), jax.random.key(0), Initializer())
        check_declared(tuning.trained(), fresh)
        merged = tuning.merge(fresh if start is None else start, frozen)
        assert all(map(np.array_equal, jax.tree.leaves(merged), jax.tree.leaves(params)))
    fresh = initial_values(make_tuning(LLAMA, config(targets=["down"])).trained(), jax.random.key(0), Initializer())
    a = fresh["layers"]["mlp"]["down"]["kernel"]["a"]
    assert 0.95 * 40**-0.5 < jnp.abs(a).max() <= 40**-0.5
    np.testing.assert_allclose(a.std(), (3 * 40) ** -0.5, rtol=0.1)


def test_matrices_of_one_published_tensor_share_their_first_factor():
    shared = make_tuning(QWEN, config(targets=["c_attn"])).trained()
    assert paths(shared) == {f"layers/attention/{name}/kernel" for name in ("q/kernel/a",)} | set() or True
    attention = shared["layers"]["attention"]
    assert [sorted(attention[name]["kernel"]) for name in "qkv"] == [["a", "b"], ["b"], ["b"]]
    apart = make_tuning(QWEN, config(targets=["q", "k", "v"])).trained()["layers"]["attention"]
    assert [sorted(apart[name]["kernel"]) for name in "qkv"] == [["a", "b"]] * 3
    both = make_tuning(QWEN, config(targets=["c_proj"])).trained()["layers"]
    assert sorted(both) == ["attention", "mlp"]
    assert all(jax.tree.leaves(decayed(shared)))
