"""Mixture of experts against a plain loop over tokens and a dense formulation; routing rules, dropping and meshes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxllm.nn.experts import mix_experts
from jaxllm.nn.moe import MixtureOfExperts, kept_selections, route, routing_statistics
from jaxllm.nn.param import is_declared
from jaxllm.sharding.mesh import MESH_AXES
from jaxllm.sharding.rules import RULES, sharding_for
from jaxllm.spec import MoE
from kernels_pallas.grouped_matmul import grouped_matmul

BATCH, LENGTH, WIDTH, EXPERTS = 3, 7, 12, 8
PLAIN = MoE(num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=6, scaling_factor=2.5)
SPECS = {
    "plain": PLAIN,
    "one expert per token": dataclasses.replace(PLAIN, num_experts_per_tok=1, norm_topk_prob=True),
    "normalised, shared": dataclasses.replace(PLAIN, norm_topk_prob=True, num_shared_experts=2),
    "best groups": dataclasses.replace(PLAIN, num_groups=4, topk_groups=2),
}
VALID = np.ones((BATCH, LENGTH), bool)

select = jax.jit(route, static_argnums=1)
keep = jax.jit(kept_selections, static_argnums=3)


def module_params(spec, width=WIDTH, seed=0):
    """Return (random parameters, their declarations) of a layer."""
    shapes = jax.ShapeDtypeStruct((1, 1, width), jnp.float32), jax.ShapeDtypeStruct((1, 1), bool)
    make = functools.partial(MixtureOfExperts(spec).init, train=False)
    declared = jax.eval_shape(make, jax.random.key(0), *shapes)["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.value.shape) * 0.5, jnp.float32)

    return jax.tree.map(draw, declared, is_leaf=is_declared), declared


def states(seed=1, shape=(BATCH, LENGTH, WIDTH)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def run(spec, params, x, valid=VALID, never_dropped=None, train=False):
    layer = MixtureOfExperts(spec)
    return layer.apply({"params": params}, x, valid, train=train, never_dropped=never_dropped)


def feed_forward(x, weights, expert=...):
    gate, up, down = (np.asarray(weights[name]["kernel"], np.float64)[expert] for name in ("gate", "up", "down"))
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def oracle(spec, params, x):
    """Compute (y, sorted expert ids, their weights) token by token in float64."""
    y, ids, weights = np.zeros(x.shape), [], []
    for place in np.ndindex(x.shape[:2]):
        token = np.asarray(x[place], np.float64)
        probs = np.exp(token @ np.asarray(params["router"]["kernel"], np.float64))
        probs /= probs.sum()
        best_of_group = probs.reshape(spec.num_groups, -1).max(axis=1)
        allowed = np.argsort(-best_of_group)[: spec.topk_groups]
        in_allowed = np.isin(np.arange(EXPERTS) * spec.num_groups // EXPERTS, allowed)
        chosen = np.sort(np.argsort(-np.where(in_allowed, probs, 0))[: spec.num_experts_per_tok])
        share = probs[chosen]
        normalised = spec.norm_topk_prob and spec.num_experts_per_tok > 1
        share = share / share.sum() if normalised else share * spec.scaling_factor
        for expert, weight in zip(chosen, share, strict=True):
            y[place] += weight * feed_forward(token, params["experts"], expert)
        if spec.num_shared_experts:
            y[place] += feed_forward(token, params["shared"])
        ids.append(chosen)
        weights.append(share)
    shape = (*x.shape[:2], spec.num_experts_per_tok)
    return y, np.reshape(ids, shape), np.reshape(weights, shape)


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_is_a_loop_over_tokens_and_their_experts(name):
    spec, x = SPECS[name], states()
    params, _ = module_params(spec)
    y, routing = run(spec, params, x)
    expected, ids, weights = oracle(spec, params, x)
    np.testing.assert_array_equal(routing.expert_ids, ids)
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    load = np.stack([np.bincount(row.reshape(-1), minlength=EXPERTS) for row in ids])
    np.testing.assert_array_equal(routing.statistics.load, load)


def dense_experts(x, expert_ids, weights, kernels):
    """All experts on all tokens, weighted by 0 where a token did not select them."""
    gate, up, down = kernels
    share = jnp.sum(jax.nn.one_hot(expert_ids, gate.shape[0]) * weights[..., None], axis=1)
    hidden = jax.nn.silu(jnp.einsum("md,edf->mef", x, gate)) * jnp.einsum("md,edf->mef", x, up)
    return jnp.einsum("mef,efd,me->md", hidden, down, share)


@jax.jit
def both_gradients(x, expert_ids, weights, kernels, cotangent):
    def gradients(mix):
        return jax.vjp(lambda x, weights, kernels: mix(x, expert_ids, weights, kernels), x, weights, kernels)

    sparse, dense = gradients(functools.partial(mix_experts, activation="silu")), gradients(dense_experts)
    return (sparse[0], sparse[1](cotangent)), (dense[0], dense[1](cotangent))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num_used=st.integers(3, EXPERTS))
@example(seed=0, num_used=3)
def test_values_and_gradients_are_those_of_dense_experts(seed, num_used):
    """Few used experts leave the others empty and make groups higher than one tile."""
    rng = np.random.default_rng(seed)
    tokens = 150
    used = rng.permutation(EXPERTS)[:num_used]
    expert_ids = np.sort(np.stack([rng.permutation(used)[:3] for _ in range(tokens)])).astype(np.int32)
    shapes = [(tokens, WIDTH), (tokens, WIDTH), (tokens, 3), *[(EXPERTS, WIDTH, 6)] * 2, (EXPERTS, 6, WIDTH)]
    x, cotangent, weights, *kernels = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    found, expected = both_gradients(x, expert_ids, weights, tuple(kernels), cotangent)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@jax.jit
def grouped_product_and_gradients(x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pullback(dy)


@pytest.mark.parametrize(
    "sizes", [[0, 0, 130, 0], [130, 0, 0, 0], [0, 0, 0, 130], [1, 64, 0, 65], [63, 1, 66, 0], [5, 0, 7, 9]]
)
def test_grouped_matmul_of_any_sizes_and_nothing_beyond_the_groups(sizes):
    """Tiles overlap the next group's rows, the last one rows of no group: nothing of them may leak."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((130, 4), (4, 4, 3), (130, 3)))
    found = grouped_product_and_gradients(x, w, np.array(sizes), dy)
    expected = np.zeros((130, 3)), np.zeros((130, 4)), np.zeros((4, 4, 3))
    for group, (start, stop) in enumerate(itertools.pairwise(np.cumsum([0, *sizes]))):
        rows = slice(start, stop)
        expected[0][rows], expected[1][rows] = x[rows] @ w[group], dy[rows] @ w[group].T
        expected[2][group] = x[rows].T @ dy[rows]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_grouped_matmul_maps_over_a_batch():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 9, 4)).astype(np.float32), rng.normal(size=(3, 4, 5)).astype(np.float32)
    mapped = jax.jit(jax.vmap(grouped_matmul, (0, None, 0)))(x, w, np.array([[2, 3, 4], [9, 0, 0]]))
    groups = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 9])
    np.testing.assert_allclose(mapped, np.einsum("bmd,bmdf->bmf", x, w[groups]), atol=1e-5)


def test_no_array_holds_all_tokens_for_every_expert():
    """Memory grows with the selections, not with tokens times experts."""
    spec = MoE(num_experts=64, num_experts_per_tok=2, moe_intermediate_size=32)
    params, _ = module_params(spec, width=32)
    x = jax.ShapeDtypeStruct((4, 256, 32), jnp.float32)

    def loss(params, x):
        return jnp.sum(MixtureOfExperts(spec).apply({"params": params}, x, np.ones((4, 256), bool), train=True)[0])

    memory = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis()
    tokens_for_every_expert = 64 * x.size * 4
    assert memory.temp_size_in_bytes < tokens_for_every_expert / 2


def test_ties_go_to_the_first_experts_and_all_tokens_may_share_them():
    params, _ = module_params(PLAIN)
    params["router"] = jax.tree.map(jnp.zeros_like, params["router"])
    x = states()
    y, routing = run(PLAIN, params, x)
    assert (np.asarray(routing.expert_ids) == [0, 1, 2]).all()
    expected = sum(feed_forward(x, params["experts"], e) for e in range(3)) * PLAIN.scaling_factor / EXPERTS
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_array_equal(routing.statistics.load, [[LENGTH] * 3 + [0] * 5] * BATCH)


def test_with_fewer_experts_in_the_best_groups_than_selections_the_rest_weighs_nothing():
    spec = dataclasses.replace(PLAIN, num_groups=4, topk_groups=1)
    logits = jnp.asarray([[0.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.5, 0.2]])
    weights, expert_ids, probs = select(logits, spec)
    np.testing.assert_array_equal(expert_ids, [[0, 2, 3]])
    np.testing.assert_allclose(weights, [[0, 2.5 * probs[0, 2], 2.5 * probs[0, 3]]])
    gradient = jax.jit(jax.grad(lambda logits: route(logits, spec)[0].sum()))(logits)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize(("normalised", "total"), [(True, 1.0), (False, None)])
def test_scaling_and_normalising_exclude_each_other(normalised, total):
    weights, expert_ids, probs = route(
        states(shape=(5, EXPERTS)), dataclasses.replace(PLAIN, norm_topk_prob=normalised)
    )
    selected = np.take_along_axis(np.asarray(probs), np.asarray(expert_ids), axis=-1)
    expected = 2.5 * selected.sum(-1) if total is None else np.full(5, total)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), expected, rtol=1e-5)


def test_padding_changes_no_other_token_and_counts_in_no_statistic():
    spec = dataclasses.replace(SPECS["normalised, shared"], capacity_factor=0.5)
    params, _ = module_params(spec)
    x, valid = states(), VALID.copy()
    valid[0, 4:] = valid[2] = False
    y, routing = run(spec, params, x, valid, train=True)
    others = np.where(valid[..., None], x, 10 * states(seed=2))
    y_other, routing_other = run(spec, params, others, valid, train=True)
    np.testing.assert_allclose(np.asarray(y)[valid], np.asarray(y_other)[valid], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, routing.statistics, routing_other.statistics)
    np.testing.assert_array_equal(routing.statistics.num_tokens, [4, LENGTH, 0])
    assert (np.asarray(routing.statistics.mean_probs[2]) == 0).all()
    np.testing.assert_allclose(np.asarray(routing.statistics.mean_probs[:2]).sum(-1), 1, rtol=1e-5)


def test_statistics_count_a_token_once_per_group():
    spec = dataclasses.replace(PLAIN, num_groups=2, topk_groups=2)
    expert_ids = jnp.asarray([[[0, 1, 2], [0, 4, 5], [5, 6, 7]]])
    probs, valid = np.full((1, 3, EXPERTS), 1 / EXPERTS), np.ones((1, 3), bool)
    found = jax.jit(routing_statistics, static_argnums=3)(probs, expert_ids, valid, spec)
    np.testing.assert_array_equal(found.sent, [[2, 2]])
    np.testing.assert_array_equal(found.load, [[2, 1, 1, 0, 1, 2, 1, 1]])


def expected_kept(affinity, groups, protected, num_groups, budget):
    """Fill each group's budget with protected selections, then by affinity."""
    kept = np.zeros(affinity.shape, bool)
    for group in range(num_groups):
        members = np.flatnonzero(groups == group)
        ranked = sorted(members, key=lambda i: (not protected[i], -affinity[i]))
        kept[ranked[: int(budget)]] = True
    return kept | protected


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    factor=st.sampled_from([0.01, 0.3, 0.77, 1.0, 1.5, 4.0]),
    protect=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH),
)
def test_each_group_keeps_its_budget_of_the_largest_affinities(seed, factor, protect):
    spec = dataclasses.replace(PLAIN, num_groups=4, topk_groups=2, capacity_factor=factor)
    rng = np.random.default_rng(seed)
    _, ids, probs = (np.asarray(part) for part in select(rng.normal(size=(BATCH, LENGTH, EXPERTS)) * 2, spec))
    valid = rng.random((BATCH, LENGTH)) < 0.8
    counted = np.broadcast_to(valid[..., None], ids.shape)
    kept = np.asarray(keep(probs, ids, valid, spec, np.array(protect)))[counted]
    protected = np.broadcast_to(np.array(protect)[:, None, None], ids.shape)[counted]
    affinity = np.take_along_axis(probs, ids, axis=-1)[counted]
    budget = np.float32(factor * 3 / 4) * np.float32(valid.sum())
    np.testing.assert_array_equal(kept, expected_kept(affinity, ids[counted] // 2, protected, 4, budget))


def test_only_training_drops_and_a_dropped_selection_adds_nothing():
    spec = dataclasses.replace(PLAIN, capacity_factor=0.5, num_groups=2, topk_groups=2)
    params, _ = module_params(spec)
    x, never = states(), np.array([False, True, False])
    whole, routing = run(spec, params, x)
    dropped, routing_dropped = run(spec, params, x, VALID, never, train=True)
    np.testing.assert_array_equal(routing.expert_ids, routing_dropped.expert_ids)
    np.testing.assert_array_equal(routing.statistics.load, routing_dropped.statistics.load)
    is_kept = np.asarray(routing_dropped.weights) > 0
    assert is_kept[1].all()
    assert 0 < is_kept[[0, 2]].sum() < is_kept[[0, 2]].size
    np.testing.assert_allclose(dropped[1], whole[1], atol=1e-5)
    flat = (
        x.reshape(-1, WIDTH),
        routing.expert_ids.reshape(-1, 3),
        np.where(is_kept, routing.weights, 0).reshape(-1, 3),
    )
    kernels = tuple(params["experts"][name]["kernel"] for name in ("gate", "up", "down"))
    np.testing.assert_allclose(dropped.reshape(-1, WIDTH), jax.jit(dense_experts)(*flat, kernels), atol=1e-4)


def test_a_bfloat16_layer_routes_in_float32():
    params, _ = module_params(PLAIN)
    x = jnp.asarray(states(), jnp.bfloat16)
    y, routing = run(PLAIN, params, x)
    expected, wide = run(PLAIN, params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights, wide.weights, rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


def mesh_of(**sizes):
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(spec, params, x, valid):
    def loss(params, x):
        y, routing = MixtureOfExperts(spec).apply({"params": params}, x, valid, train=True)
        return jnp.sum(jnp.sin(y)), (y, routing)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (3, {"fsdp": 2, "expert": 2, "tensor": 2}),
        pytest.param(8, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(8, {"replica": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_gives_the_values_and_gradients_of_one_device(rows, sizes):
    """Three rows do not divide over the devices: some compute padding."""
    spec = dataclasses.replace(PLAIN, num_shared_experts=1, num_groups=4, topk_groups=2, capacity_factor=0.8)
    params, declared = module_params(spec)
    x, valid = states(shape=(rows, LENGTH, WIDTH)), np.arange(rows * LENGTH).reshape(rows, LENGTH) % 5 > 0
    expected = value_and_gradients(spec, params, x, valid)
    mesh = mesh_of(**sizes)
    shardings = jax.tree.map(lambda d: sharding_for(d.value.shape, d.axes, mesh), declared, is_leaf=is_declared)
    placed = jax.device_put(params, shardings)
    if rows % (mesh.shape["fsdp_x"] * mesh.shape["expert"]) == 0:
        x, valid = (jax.device_put(a, NamedSharding(mesh, RULES.spec(("batch", "length")))) for a in (x, valid))
    with jax.set_mesh(mesh):
        found = value_and_gradients(spec, placed, x, valid)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(np.asarray(other)).max() + 1e-7)


def test_parameters_are_declared_with_their_axes_and_inputs():
    _, declared = module_params(SPECS["normalised, shared"])
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_declared)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.value.shape, leaf.axes, leaf.kind, leaf.fan_in)
        for path, leaf in leaves
    }
    assert found == {
        "router/kernel": ((WIDTH, EXPERTS), ("expert_embed", "experts"), "matrix", WIDTH),
        "experts/gate/kernel": ((EXPERTS, WIDTH, 6), ("experts", "expert_embed", "mlp"), "matrix", WIDTH),
        "experts/up/kernel": ((EXPERTS, WIDTH, 6), ("experts", "expert_embed", "mlp"), "matrix", WIDTH),
        "experts/down/kernel": ((EXPERTS, 6, WIDTH), ("experts", "mlp", "expert_embed"), "output", 6),
        "shared/gate/kernel": ((WIDTH, 12), ("embed", "mlp"), "matrix", WIDTH),
        "shared/up/kernel": ((WIDTH, 12), ("embed", "mlp"), "matrix", WIDTH),
        "shared/down/kernel": ((12, WIDTH), ("mlp", "embed"), "output", 12),
    }
