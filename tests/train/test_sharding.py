"""Every mesh trains alike, and no device ever holds what belongs to others."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jaxllm
from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.nn.param import Initializer
from jaxllm.sharding.rules import RULES
from jaxllm.spec import tiny
from jaxllm.train.step import make_init
from tests.train.training_steps import SPECS, Trainer, batch

STEPS = 20
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "tensor 2": {"tensor": 2},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "replica 2 x fsdp 2 x tensor 2": {"replica": 2, "fsdp": 2, "tensor": 2},
}
QUICK = {("llama", "fsdp 4 x tensor 2"), ("qwen", "replica 2 x fsdp 2 x tensor 2")}
CASES = [
    pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
    for family in SPECS
    for name in MESHES
]


@functools.cache
def one_device(family):
    return Trainer(SPECS[family]).run(STEPS)[1]


def spread(leaf):
    return leaf.sharding, leaf.sharding.shard_shape(leaf.shape)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_mesh_gives_the_losses_of_one_device_and_keeps_every_array_where_it_was(family, name):
    losses = one_device(family)
    trainer = Trainer(SPECS[family], **MESHES[name])
    on_many, losses_on_many = trainer.run(STEPS)
    assert losses[18] < losses[0] - 0.05
    np.testing.assert_allclose(losses_on_many, losses, rtol=0, atol=1e-5)
    assert jax.tree.map(spread, on_many) == jax.tree.map(spread, trainer.abstract)
    adam = next(part for part in jax.tree.leaves(on_many.opt_state, is_leaf=_has_moments) if _has_moments(part))
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(spread, moments) == jax.tree.map(spread, on_many.params)


def _has_moments(node):
    return isinstance(node, tuple) and "mu" in getattr(node, "_fields", ())


@pytest.mark.parametrize("family", SPECS)
def test_matrices_are_split_over_the_whole_mesh(family):
    state = Trainer(SPECS[family], fsdp=4, tensor=2).abstract
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        whole, part = math.prod(leaf.shape), math.prod(leaf.sharding.shard_shape(leaf.shape))
        if whole > 1000:
            assert whole == 8 * part, jax.tree_util.keystr(path)


def wide(spec):
    """Widen a tiny spec until its matrices outweigh everything else."""
    return dataclasses.replace(
        spec,
        hidden_size=512,
        num_layers=8,
        attention=dataclasses.replace(spec.attention, num_heads=8, num_kv_heads=4, head_dim=64),
        mlp=dataclasses.replace(spec.mlp, intermediate_size=1408),
    )


def test_no_device_holds_a_whole_copy_while_a_state_is_drawn():
    trainer = Trainer(wide(SPECS["llama"]), fsdp=4, tensor=2)
    draw = make_init(trainer.objective.declarations(), trainer.optimizer, trainer.mesh, Initializer())
    memory = draw.lower(jax.random.key(0)).compile().memory_analysis()
    whole = num_bytes(trainer.abstract)
    assert memory.output_size_in_bytes < 1.02 * whole / 8
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 4


def test_gradients_are_summed_in_shards():
    trainer = Trainer(wide(SPECS["llama"]), fsdp=8, grad_accum=4, remat="full", chunk=4)
    rows = NamedSharding(trainer.mesh, RULES.spec(("batch", "length")))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((64, x.shape[1]), x.dtype, sharding=rows), batch(0))
    with jax.set_mesh(trainer.mesh):
        compiled = trainer.step.lower(trainer.abstract, abstract, np.float32(0), None).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * num_bytes(trainer.abstract) / 8, "the old state is not donated"
    assert memory.temp_size_in_bytes < 0.7 * num_bytes(trainer.abstract.params), "a whole gradient lies on a device"


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_checkpoint_is_restored_straight_onto_another_mesh(tmp_path):
    state = Trainer(fsdp=4, tensor=2).fresh()
    with CheckpointManager(tmp_path, keep_last=1, keep_every=None) as manager:
        manager.save(state, data_state={}, meta={})
        manager.wait()
        other = Trainer(SPECS["llama"], fsdp=8)
        restored, _, _ = manager.restore(other.abstract)
    assert jax.tree.map(spread, restored) == jax.tree.map(spread, other.abstract)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


TORUSES = {
    "2 x 2 torus x tensor 2": {"fsdp_x": 2, "fsdp_y": 2, "tensor": 2},
    "replica 2 x 2 x 2 torus": {"replica": 2, "fsdp_x": 2, "fsdp_y": 2},
    "2 x expert 2 x tensor 2": {"fsdp_x": 2, "expert": 2, "tensor": 2},
}
STAGED_SPECS = SPECS | {name: tiny(jaxllm.spec(name)) for name in ("deepseek-v2-lite", "baichuan2-7b", "glm-10b")}
STAGED_QUICK = {
    ("llama", "2 x 2 torus x tensor 2", "none"),
    ("deepseek-v2-lite", "2 x expert 2 x tensor 2", "full"),
    ("baichuan2-7b", "replica 2 x 2 x 2 torus", "dots"),
}
STAGED_CASES = [
    pytest.param(*case, marks=() if case in STAGED_QUICK else pytest.mark.slow)
    for case in itertools.product(STAGED_SPECS, TORUSES, ("none", "full", "dots"))
]


@pytest.mark.parametrize(("family", "name", "remat"), STAGED_CASES)
def test_weights_gathered_by_hand_train_as_one_device_does(family, name, remat):
    """Losses agree, and so do all parameters after some steps, hence all gradients."""
    spec = STAGED_SPECS[family]
    state, losses = Trainer(spec).run(4)
    trainer = Trainer(spec, torus=TORUSES[name], remat=remat)
    on_many, losses_on_many = trainer.run(4)
    np.testing.assert_allclose(losses_on_many, losses, rtol=0, atol=1e-5)
    assert jax.tree.map(spread, on_many) == jax.tree.map(spread, trainer.abstract)
    np.testing.assert_allclose(trainer.evaluate(on_many), Trainer(spec).evaluate(state), rtol=1e-5)
    for expected, found in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(on_many.opt_state), strict=True):
        expected, found = np.asarray(expected), np.asarray(found)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(initial=1e-9))


def test_a_backward_pass_keeps_no_gathered_weights():
    """Even where nothing else is recomputed: what is kept of a layer is less than its weights."""
    spec = wide(SPECS["llama"])
    trainer = Trainer(spec, torus={"fsdp_x": 4, "fsdp_y": 2}, remat="none")
    rows = NamedSharding(trainer.mesh, RULES.spec(("batch", "length")))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch(0))
    with jax.set_mesh(trainer.mesh):
        memory = trainer.step.lower(trainer.abstract, abstract, np.float32(0), None).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.7 * num_bytes(trainer.abstract.params)
