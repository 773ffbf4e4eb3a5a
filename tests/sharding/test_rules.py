"""Sharding rules, meshes and their errors; a sharded model equals an unsharded one."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import InputError
from jaxllm.nn.model import abstract_params, apply
from jaxllm.sharding.mesh import MESH_AXES, make_mesh, split_torus
from jaxllm.sharding.rules import FSDP_AXES, RULES, ShardingRules, constrain, sharding_for
from tests.tiny_models import LLAMA, make_batch, random_params


def test_default_rules_name_every_parameter_and_activation_once():
    assert RULES.spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, (*FSDP_AXES, "expert"), "tensor", None
    )
    assert RULES.spec(("vocab", "embed")) == PartitionSpec("tensor", (*FSDP_AXES, "expert"))
    assert RULES.spec(("batch", None, "act_mlp")) == PartitionSpec(("replica", *FSDP_AXES, "expert"), None, "tensor")
    assert RULES.spec(("experts", "expert_embed", "mlp")) == PartitionSpec("expert", FSDP_AXES, "tensor")


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(InputError, match="use a mesh axis twice"):
        RULES.spec(("heads", "mlp"))
    with pytest.raises(InputError, match="use a mesh axis twice"):
        ShardingRules(embed=("fsdp_x", "tensor")).spec(("embed", "mlp"))


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(InputError, match=r"unknown logical axis 'header'; known: .*heads"):
        RULES.spec(("embed", "header"))


def test_a_dimension_that_does_not_divide_names_everything():
    mesh = make_mesh(fsdp=4, tensor=2)
    assert sharding_for((8, 6), ("expert_embed", "mlp"), mesh).spec == PartitionSpec(FSDP_AXES, "tensor")
    with pytest.raises(InputError, match="mlp of size 7 cannot be split 2 ways over tensor"):
        sharding_for((8, 7), ("embed", "mlp"), mesh)
    wide = ShardingRules(vocab=("fsdp_x", "tensor"))
    with pytest.raises(InputError, match="vocab of size 12 cannot be split 8 ways over fsdp_x x tensor"):
        sharding_for((12, 8), ("vocab", "norm"), mesh, wide)


def test_meshes_have_all_axes_in_their_fixed_order():
    mesh = make_mesh(replica=2, tensor=2)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {"replica": 2, "fsdp_x": 2, "tensor": 2}
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, "replica 1 x expert 1 x tensor 3 does not divide the 8 devices"),
        ({"fsdp": 2, "tensor": 2}, "replica 1 x fsdp 2 x expert 1 x tensor 2 = 4 devices, but there are 8"),
        ({"replica": 16, "fsdp": 1}, "replica 16 x fsdp 1 x expert 1 x tensor 1 = 16 devices, but there are 8"),
        ({"replica": 16}, "replica 16 x expert 1 x tensor 1 does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**sizes)


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = np.zeros((8, 4, 6), np.float32)
    assert constrain(x, "batch", "length", "act_mlp") is x
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "batch", "length", "act_mlp"))(x)
    assert pinned.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp_x", None, "tensor")), 3)


def test_every_parameter_of_a_model_is_split_over_the_whole_mesh():
    spec = dataclasses.replace(LLAMA, vocab_size=64)
    mesh = make_mesh(fsdp=4, tensor=2)
    params = abstract_params(spec, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shard = np.prod(leaf.sharding.shard_shape(leaf.shape))
        expected = 1 if path[-1].key == "scale" else 8
        assert leaf.size == expected * shard, jax.tree_util.keystr(path)


def test_a_sharded_model_gives_the_logits_of_an_unsharded_one():
    spec = dataclasses.replace(LLAMA, vocab_size=64)
    params = random_params(spec)
    batch = make_batch(np.random.default_rng(0).integers(0, 64, (4, 6)))
    forward = jax.jit(lambda params, batch: apply(spec, params, batch).logits)
    alone = np.asarray(forward(params, batch))
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(spec, mesh))
    with jax.set_mesh(mesh):
        logits = forward(jax.device_put(params, shardings), jax.device_put(batch, NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_allclose(logits, alone, atol=1e-5)
    assert logits.addressable_shards[0].data.size * 8 == logits.size


@pytest.mark.parametrize(
    ("torus", "sizes", "expected"),
    [
        ((1, 16, 16, 1, 1), {"tensor": 1}, {"fsdp_x": 16, "fsdp_y": 16}),
        ((1, 16, 16, 1, 1), {"tensor": 16}, {"fsdp_x": 16}),
        ((1, 16, 16, 1, 1), {"tensor": 4}, {"fsdp_x": 16, "fsdp_y": 4}),
        ((1, 8, 8, 8, 1), {"tensor": 2, "expert": 8}, {"fsdp_x": 8, "fsdp_z": 4}),
        ((4, 4, 4, 4, 1), {"tensor": 8, "replica": 4}, {"fsdp_x": 4, "fsdp_y": 2}),
        ((1, 4, 4, 4, 2), {"tensor": 2}, {"fsdp_x": 4, "fsdp_y": 4, "fsdp_z": 4}),
        ((1, 6, 4, 1, 1), {"tensor": 3}, {"fsdp_x": 2, "fsdp_y": 4}),
    ],
)
def test_axes_lie_along_the_dimensions_of_a_torus(torus, sizes, expected):
    parts = split_torus(torus, sizes)
    assert [np.prod([size for _, size in dimension]) for dimension in parts] == list(torus)
    products = {}
    for axis, size in (part for dimension in parts for part in dimension):
        products[axis] = products.get(axis, 1) * size
    assert {axis: size for axis, size in products.items() if size > 1} == {
        axis: size for axis, size in (sizes | expected).items() if size > 1
    }


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 16]), min_size=5, max_size=5), st.data())
def test_any_sizes_that_divide_the_devices_fit_a_torus(torus, data):
    left, sizes = int(np.prod(torus)), {}
    for axis in ("tensor", "expert", "replica"):
        sizes[axis] = data.draw(st.sampled_from([size for size in range(1, min(left, 256) + 1) if left % size == 0]))
        left //= sizes[axis]
    parts = [part for dimension in split_torus(torus, sizes) for part in dimension]
    for axis, size in sizes.items():
        assert np.prod([part for name, part in parts if name == axis]) == size
    assert np.prod([size for _, size in parts]) == np.prod(torus)
