"""Declarations and what is read from them: initial values, counts, decay mask, shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.errors import InputError
from jaxllm.nn.model import abstract_params, count_matmul_params, count_params, decay_mask, declarations
from jaxllm.nn.param import Initializer, initial_values, is_declared
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.rules import sharding_for
from jaxllm.spec import Head
from tests.tiny_models import LLAMA, QWEN, TIED_LLAMA

SPEC = dataclasses.replace(QWEN, hidden_size=32, vocab_size=256)
KEY = jax.random.key(0)


# Every kind of parameter, but not all: each draw takes its time to compile.
WHOLE = declarations(SPEC)
PART = {name: WHOLE[name] for name in ("embedding", "head")} | {
    "layers": {name: WHOLE["layers"][name] for name in ("attention", "attention_norm")}
}
FAN_IN = Initializer(scheme="fan_in", embedding_std=1.0, output_scale=0.5)


@pytest.fixture(scope="module")
def initial():
    return jax.jit(lambda key: initial_values(PART, key, FAN_IN))(KEY)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_declared)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_initial_values_have_the_declared_deviations(initial):
    values = jax.tree.map(np.asarray, named(initial))
    for name, declared in named(PART).items():
        if declared.kind in ("ones", "zeros"):
            assert (values[name] == (declared.kind == "ones")).all()
            continue
        expected = {"embedding": 1.0, "matrix": declared.fan_in**-0.5, "output": 0.5 * declared.fan_in**-0.5}
        assert FAN_IN.deviation(declared) == expected[declared.kind]
        assert Initializer().deviation(declared) == 0.02
        assert abs(values[name].std() / expected[declared.kind] - 1) < 0.1, name
        assert abs(values[name].mean()) < 0.1 * expected[declared.kind]


def test_fan_in_is_the_number_of_inputs():
    declared = named(declarations(SPEC))
    fan_in = {name: leaf.fan_in for name, leaf in declared.items() if leaf.kind in ("matrix", "output")}
    attention, width = SPEC.attention, SPEC.hidden_size
    assert fan_in == {
        **{f"layers/attention/{name}/kernel": width for name in "qkv"},
        "layers/attention/o/kernel": attention.num_heads * attention.head_dim,
        "layers/mlp/gate/kernel": width,
        "layers/mlp/up/kernel": width,
        "layers/mlp/down/kernel": SPEC.mlp.intermediate_size,
        "head": width,
    }


def test_no_two_parameters_or_layers_start_alike(initial):
    drawn = [np.asarray(leaf) for leaf in jax.tree.leaves(initial)]
    drawn = [leaf for leaf in drawn if leaf.std() > 0]
    firsts = [leaf.reshape(-1)[:8] for leaf in drawn] + [leaf[1].reshape(-1)[:8] for leaf in drawn if leaf.ndim > 2]
    assert len({first.tobytes() for first in firsts}) == len(firsts)


def test_initial_values_depend_on_key_and_name_alone_not_on_mesh_or_neighbours(initial):
    two = {name: declarations(SPEC)[name] for name in ("embedding", "head")}
    mesh = make_mesh(fsdp=2, tensor=4)
    shardings = {name: sharding_for(leaf.value.shape, leaf.axes, mesh) for name, leaf in two.items()}
    sharded = jax.jit(lambda key: initial_values(two, key, FAN_IN), out_shardings=shardings)(KEY)
    for name, value in sharded.items():
        np.testing.assert_array_equal(value, initial[name])
        assert value.addressable_shards[0].data.size * 8 == value.size


def test_counts():
    values = abstract_params(SPEC)
    assert count_params(SPEC) == sum(leaf.size for leaf in jax.tree.leaves(values))
    untied = dataclasses.replace(SPEC, head=Head(tie_word_embeddings=False))
    tied = dataclasses.replace(SPEC, head=Head(tie_word_embeddings=True))
    table = SPEC.vocab_size * SPEC.hidden_size
    assert count_params(untied) - count_params(tied) == table
    assert count_matmul_params(untied) == count_matmul_params(tied)
    norms_and_biases = 32 + SPEC.num_layers * (2 * 32 + 3 * SPEC.attention.num_heads * SPEC.attention.head_dim)
    assert count_matmul_params(untied) == count_params(untied) - table - norms_and_biases


def test_decay_spares_norms_and_biases():
    mask = named(decay_mask(QWEN))
    spared = {name for name, decays in mask.items() if not decays}
    assert spared == {name for name in mask if name.endswith(("scale", "bias"))}
    assert len(spared) == 6


def test_a_tied_model_has_no_head():
    assert "head" not in abstract_params(TIED_LLAMA)
    assert "head" in abstract_params(LLAMA)


def test_abstract_parameters_cost_nothing_even_for_the_largest_model():
    params = abstract_params(jaxllm.spec("qwen-72b"), make_mesh(fsdp=8), jnp.bfloat16)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params))
    assert sum(np.prod(shape) for shape in shards) < 1.01 * count_params(jaxllm.spec("qwen-72b")) / 8


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(InputError, match="vocab of size 61 cannot be split 2 ways over tensor"):
        abstract_params(TIED_LLAMA, make_mesh(fsdp=4, tensor=2))
