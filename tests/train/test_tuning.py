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
SPECS = {"llama": LLAMA, "qwen": QWEN, "chatglm2": GLM, "deepseek-v2": DEEPSEEK}
ROWS, LENGTH = 2, 8
TOKENS = np.random.default_rng(0).integers(0, 60, (ROWS, LENGTH))

logits_of = jax.jit(
    lambda spec, params, adapter, batch: apply(spec, params, batch, adapter=adapter).logits, static_argnums=0
)


def drawn(tuning, seed=0):
    """Return values of what is trained, none of them zero."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.value.shape) * 0.3, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, tuning.trained(), is_leaf=is_declared)


def config(**options):
    return AdapterConfig(**{"rank": 3, "alpha": 5.0} | options)


def check_declared(declared, values):
    """Check that values have the shapes and dtypes that their declarations say."""
    shapes = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), values)
    expected = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype), declared, is_leaf=is_declared
    )
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(expected)


@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
@pytest.mark.parametrize("name", SPECS)
def test_a_merged_model_is_the_base_with_its_adapter(name, base):
    spec = SPECS[name]
    tuning = make_tuning(spec, config(base=base, targets=[] if base == "float32" else ["attention", "mlp"]))
    nothing, frozen = jax.jit(tuning.split)(random_params(spec))
    assert nothing is None
    check_declared(tuning.frozen(), frozen)
    trained = drawn(tuning)
    params, adapter = tuning.join(trained, frozen)
    merged = tuning.merge(trained, frozen)
    check_declared(declarations(spec), merged)
    batch = make_batch(TOKENS)
    logits = logits_of(spec, params, adapter, batch)
    np.testing.assert_allclose(logits, logits_of(spec, merged, None, batch), atol=1e-5 * float(jnp.abs(logits).max()))
    assert np.abs(logits - logits_of(spec, params, None, batch)).max() > 0.01
