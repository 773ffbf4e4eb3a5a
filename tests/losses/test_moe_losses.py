"""Balance losses from router logits against goldens, values and gradients, through the model's own routing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import (
    balance_loss,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    load_balancing_loss,
    router_z_loss,
)
from jaxllm.nn.moe import RoutingStatistics, kept_selections, route, routing_statistics
from jaxllm.spec import MoE

BATCH, LENGTH, EXPERTS = 2, 12, 8
GREEDY = MoE(num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=4, scaling_factor=16.0)
GROUP_LIMITED = dataclasses.replace(GREEDY, num_groups=4, topk_groups=2)
ALL_VALID = np.ones((BATCH, LENGTH), bool)


@pytest.fixture(scope="module")
def mixtral(goldens):
    return np.load(goldens / "moe_mixtral.npz")


@pytest.fixture(scope="module")
def deepseek(goldens):
    return np.load(goldens / "moe_deepseek_v2.npz")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=1)
def statistics_of(logits, spec, valid=ALL_VALID):
    _, expert_ids, probs = route(logits, spec)
    return routing_statistics(probs, expert_ids, valid, spec)


def loss_of(found, **settings):
    return balance_loss(found.load, found.mean_probs, found.sent, found.num_tokens, devices_per_token=2, **settings)


@functools.partial(jax.jit, static_argnums=1, static_argnames=("expert", "device", "communication", "per_sequence"))
def deepseek_loss(logits, spec, valid=ALL_VALID, **settings):
    return loss_of(statistics_of(logits, spec, valid), **settings)


def assert_golden(loss, logits, expected, expected_gradient, *, tolerance):
    """Compare a loss and its gradient; gradients are small, so their tolerance is relative to the largest."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=tolerance, atol=tolerance * np.abs(expected_gradient).max()
    )


@pytest.mark.parametrize(("name", "spec"), [("greedy", GREEDY), ("grouplimited", GROUP_LIMITED)])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_routing_and_expert_loss_of_the_published_gate(deepseek, x64, name, spec, per_sequence):
    prefix = f"{name}_{'seq' if per_sequence else 'flat'}"
    logits, alpha = deepseek["router_logits"], float(deepseek["alpha1"])
    weights, expert_ids, _ = route(jnp.asarray(logits), spec)
    np.testing.assert_array_equal(expert_ids.reshape(-1, 2), deepseek[f"{prefix}_topk_idx_sorted"])
    np.testing.assert_allclose(weights.reshape(-1, 2), deepseek[f"{prefix}_topk_weight"], rtol=2e-6)
    assert_golden(
        lambda logits: deepseek_loss(logits, spec, expert=alpha, per_sequence=per_sequence),
        logits,
        deepseek[f"{prefix}_expert_loss"],
        deepseek[f"{prefix}_expert_dlogits"],
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "weight", "setting"),
    [("expert", "alpha1", "expert"), ("device", "alpha2", "device"), ("comm", "alpha3", "communication")],
)
def test_each_deepseek_loss_in_float64(deepseek, x64, name, weight, setting):
    alpha = float(deepseek[weight])
    assert_golden(
        lambda logits: deepseek_loss(logits, GROUP_LIMITED, **{setting: alpha}),
        deepseek["router_logits"],
        deepseek[f"f64_{name}_loss"],
        deepseek[f"f64_{name}_dlogits"],
        tolerance=1e-9,
    )


def test_deepseek_factors(deepseek, x64):
    found = statistics_of(jnp.asarray(deepseek["router_logits"]), GROUP_LIMITED)
    relative_load = EXPERTS / (2 * LENGTH) * found.load
    np.testing.assert_allclose(relative_load, deepseek["f_i"], rtol=1e-9)
    np.testing.assert_allclose(found.mean_probs, deepseek["P_i"], rtol=1e-9)
    np.testing.assert_array_equal(found.sent, deepseek["tokens_sent_to_device"])
    np.testing.assert_array_equal(found.num_tokens, [LENGTH, LENGTH])
    np.testing.assert_allclose(relative_load.reshape(2, 4, 2).mean(-1), deepseek["f_dev"], rtol=1e-9)
    by_device = found.mean_probs.reshape(2, 4, 2).sum(-1)
    np.testing.assert_allclose(by_device, deepseek["P_dev"], rtol=1e-9)
    # The parts, each sequence apart, against their equations on the golden's factors.
    expected = {name: (deepseek[f"f_{name}"] * deepseek["P_dev"]).sum(-1) for name in ("dev", "comm")}
    load, probs = found.load, found.mean_probs
    np.testing.assert_allclose(expert_balance_loss(load, probs), (deepseek["f_i"] * deepseek["P_i"]).sum(-1))
    np.testing.assert_allclose(device_balance_loss(load, probs, num_devices=4), expected["dev"])
    sent, tokens = found.sent, found.num_tokens
    np.testing.assert_allclose(
        communication_balance_loss(sent, probs, tokens, devices_per_token=2), expected["comm"], rtol=1e-9
    )


def test_dropping_golden(deepseek, x64):
    spec = dataclasses.replace(GROUP_LIMITED, capacity_factor=1.0)
    _, expert_ids, probs = route(jnp.asarray(deepseek["router_logits"]), spec)
    kept = np.asarray(kept_selections(probs, expert_ids, ALL_VALID, spec)).reshape(-1, 2)
    np.testing.assert_array_equal(kept, deepseek["drop_keep_mask"])
    device = np.asarray(expert_ids).reshape(-1, 2) // 2
    assert np.bincount(device[kept]).max() == deepseek["drop_capacity_slots_per_device"]


@pytest.mark.parametrize("per_sequence", [True, False])
def test_padding_counts_in_no_loss(deepseek, per_sequence):
    """Neither the padding of a row nor a row of padding."""
    settings = {"expert": 0.3, "device": 0.2, "communication": 0.1, "per_sequence": per_sequence}
    logits = deepseek["router_logits"].astype(np.float32)
    short = deepseek_loss(logits[:, :7], GROUP_LIMITED, ALL_VALID[:, :7], **settings)
    padded = np.concatenate([logits, logits[:1]])
    valid = np.zeros((3, LENGTH), bool)
    valid[:2, :7] = True
    differentiate = jax.jit(jax.value_and_grad(lambda logits: deepseek_loss(logits, GROUP_LIMITED, valid, **settings)))
    loss, gradient = differentiate(padded)
    np.testing.assert_allclose(loss, short, rtol=1e-6)
    assert (np.abs(gradient).max(axis=-1) > 0).tolist() == valid.tolist()


@pytest.mark.parametrize("per_sequence", [True, False])
def test_layers_are_leading_axes(deepseek, per_sequence):
    logits = deepseek["router_logits"].astype(np.float32)
    layers = [statistics_of(logits * scale, GROUP_LIMITED) for scale in (1.0, 0.5)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    weighted = jax.jit(
        lambda found: loss_of(found, expert=1.0, device=2.0, communication=3.0, per_sequence=per_sequence)
    )
    np.testing.assert_allclose(weighted(stacked), [weighted(layer) for layer in layers], rtol=1e-6)


def test_perfect_balance_gives_each_loss_its_weight():
    """With equal loads every loss is 1 (communication: groups used over groups allowed), whatever the batch."""
    load, probs = np.full((3, EXPERTS), 6.0), np.full((3, EXPERTS), 1 / EXPERTS)
    sent, tokens = np.full((3, 4), 12.0), np.full(3, 24.0)
    found = RoutingStatistics(load=load, mean_probs=probs, sent=sent, num_tokens=tokens)
    loss = jax.jit(lambda found: loss_of(found, expert=1.0, device=10.0, communication=100.0))(found)
    np.testing.assert_allclose(loss, 111.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "num_layers", "is_masked"), [("1layer", 1, False), ("2layer", 2, False), ("2layer_masked", 2, True)]
)
def test_mixtral_goldens(mixtral, x64, name, num_layers, is_masked):
    other_layers = [jnp.asarray(mixtral["router_logits_layer1"])][: num_layers - 1]
    mask = mixtral["attention_mask"].reshape(-1) if is_masked else None
    assert_golden(
        lambda logits: load_balancing_loss(jnp.stack([logits, *other_layers]), top_k=2, mask=mask),
        mixtral["router_logits_layer0"],
        mixtral[f"mixtral_{name}_loss"],
        mixtral[f"mixtral_{name}_dlogits0"],
        tolerance=1e-6,
    )


def test_router_z_loss_golden(mixtral, x64):
    logits, expected = mixtral["router_logits_layer0"], (mixtral["router_z_loss"], mixtral["router_z_dlogits"])
    assert_golden(router_z_loss, logits, *expected, tolerance=1e-9)
    # A mask leaves the loss of the tokens that it keeps.
    mask = mixtral["attention_mask"].reshape(-1)
    masked = jax.jit(lambda logits: router_z_loss(logits, mask=mask))(logits)
    np.testing.assert_allclose(masked, jax.jit(router_z_loss)(logits[mask == 1]), rtol=1e-12)


def test_a_mask_that_leaves_nothing_gives_no_loss(mixtral):
    logits = mixtral["router_logits_layer0"]
    assert load_balancing_loss(logits, top_k=2, mask=np.zeros(len(logits))) == 0
    assert router_z_loss(logits, mask=np.zeros(len(logits))) == 0


def test_loads_may_be_integers(deepseek, x64):
    found = statistics_of(jnp.asarray(deepseek["router_logits"]), GROUP_LIMITED)
    counts = [np.asarray(each).astype(np.int32) for each in (found.load, found.sent, found.num_tokens)]
    counted = found.replace(load=counts[0], sent=counts[1], num_tokens=counts[2])
    options = {"expert": 0.3, "device": 0.2, "communication": 0.1}
    np.testing.assert_allclose(loss_of(counted, **options), loss_of(found, **options), rtol=1e-12)
    narrow = counted.replace(mean_probs=found.mean_probs.astype(jnp.float32))
    assert loss_of(narrow, **options).dtype == jnp.float32
