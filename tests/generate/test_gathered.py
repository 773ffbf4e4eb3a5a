"""Weights put together to sample with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxllm
from jaxllm.generate.decoding import Weights
from jaxllm.generate.gathered import gather_weights
from jaxllm.nn.adapter import LowRank
from jaxllm.nn.quantized import quantize
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import tiny
from tests.generate.test_rollout import NEW, PROMPTS, keys_of, make_sampler, place
from tests.tiny_models import LLAMA, random_params

MESH = dict(tensor=2, expert=2, fsdp=2)


def gathered(name, mesh, dtype=jnp.bfloat16):
    """Return (the parameters of a tiny model on a mesh, as they are sampled with)."""
    spec = tiny(jaxllm.spec(name))
    params = place(spec, random_params(spec), mesh)
    return params, gather_weights(spec, Weights(params), dtype).params


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("name", ["llama2-70b", "baichuan2-7b", "deepseek-v2-lite"])
def test_only_what_the_model_casts_is_cast(name):
    params, whole = gathered(name, make_mesh(**MESH))
    for (path, leaf), found in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(whole), strict=True):
        assert not {"fsdp_x", "fsdp_y", "fsdp_z"} & {axis for axes in found.sharding.spec for axis in axes or ()}
        np.testing.assert_array_equal(found, leaf.astype(found.dtype), jax.tree_util.keystr(path))
    group = next(each for each in whole if each.startswith("layers"))
    assert at(whole, f"{group}/attention_norm/scale") is at(params, f"{group}/attention_norm/scale")
    assert whole["embedding"].dtype == jnp.bfloat16
    assert whole["head"].dtype == (jnp.float32 if name == "baichuan2-7b" else jnp.bfloat16)  # normalised in float32
    if name == "deepseek-v2-lite":
        experts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole) if "experts" in str(path)]
        assert experts and all("expert" in str(leaf.sharding.spec) for leaf in experts)
        routers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole) if "router" in str(path)]
        assert routers and {leaf.dtype for leaf in routers} == {jnp.dtype(jnp.float32)}


def test_what_lies_so_already_is_not_copied():
    params, whole = gathered("llama2-70b", make_mesh(devices=jax.devices()[:1]), jnp.float32)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(params), jax.tree.leaves(whole)))


def test_codes_and_adapters_are_gathered_as_they_are():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    split = jax.NamedSharding(mesh, P(None, ("fsdp_x", "fsdp_y")))
    codes = jax.device_put(quantize(jax.random.normal(jax.random.key(0), (16, 16)), (-2,), "nf4"), split)
    factor = jax.device_put(jnp.ones((16, 8)), split)
    found = gather_weights(LLAMA, Weights({"m": codes}, {"m": LowRank(factor, factor)}), jnp.bfloat16)
    assert found.params["m"].codes.dtype == jnp.uint8 and found.adapter["m"].a.dtype == jnp.float32
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found.params["m"].widened(jnp.float32), codes.widened(jnp.float32))


@pytest.mark.slow
def test_answers_are_those_of_weights_gathered_for_every_token():
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    params = place(LLAMA, random_params(LLAMA, scale=0.15), mesh)
    samples = [
        make_sampler(LLAMA, mesh, compute_dtype=jnp.bfloat16, gathers=gathers).sample(params, None, PROMPTS, keys_of(4))
        for gathers in (True, False)
    ]
    assert samples[0].tokens.shape[1] >= NEW
    np.testing.assert_array_equal(samples[0].tokens, samples[1].tokens)
    np.testing.assert_allclose(samples[0].logps, samples[1].logps, atol=0.02)
