"""The objectives of the policy stages: what they compute of a batch, in one piece and in several."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.config.alignment import AdapterConfig, GRPOConfig, PPOConfig
from jaxllm.losses.grpo import grpo_loss, k3_kl
from jaxllm.losses.ppo import policy_loss, value_loss
from jaxllm.sharding.mesh import make_mesh
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.actor_critic import ActorCritic
from jaxllm.train.objectives.advantages import Judged, Measured, actor_critic_batch, group_batch
from jaxllm.train.objectives.policy import GroupPolicy
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.step import make_train_step
from jaxllm.train.tuning import FullTuning, make_tuning
from jaxllm.train.tuning.headless import Headless
from jaxllm.types import Batch, RolloutBatch, TrainState
from tests.tiny_models import LLAMA, random_params

ROWS, LENGTH, SAMPLES = 8, 12, 4
OLD = 0.05


def forward(tuning=None):
    return Forward(
        spec=LLAMA,
        tuning=tuning or FullTuning(LLAMA),
        compute_dtype=jnp.dtype("float32"),
        remat="none",
        chunk=LENGTH,
    )


@functools.cache
def answers(seed=0):
    """Return rows of prompts with answers of several lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, LLAMA.vocab_size, (ROWS, LENGTH), np.int32)
    starts, ends = rng.integers(2, 5, ROWS)[:, None], rng.integers(6, LENGTH + 1, ROWS)[:, None]
    slots = np.arange(LENGTH)[None]
    valid = slots < ends
    return Batch(
        tokens=jnp.where(valid, tokens, 0),
        targets=jnp.where(slots < ends - 1, np.roll(tokens, -1, axis=1), 0),
        loss_weights=jnp.float32((slots >= starts - 1) & (slots < ends - 1)),
        positions=jnp.int32(np.where(valid, slots, 0)),
        segment_ids=jnp.int32(valid),
    )


def near(logps, seed):
    """Return log-probabilities that differ a little."""
    return logps + OLD * np.random.default_rng(seed).standard_normal(logps.shape, np.float32)


def rollout(logps, **extra):
    rng = np.random.default_rng(1)
    values = {name: jnp.asarray(rng.standard_normal(logps.shape, np.float32)) for name in ("advantages", *extra)}
    return RolloutBatch(rows=answers(), old_logps=near(logps, 2), **values)


def group_policy(**options):
    config = GRPOConfig(clip_low=0.01, **options)
    return GroupPolicy(forward=forward(), config=config, reference=None, temperature=0.7, samples=SAMPLES, max_length=9)


def actor_critic(**options):
    return ActorCritic(
        forward=forward(),
        critic=forward(Headless(FullTuning(LLAMA))),
        config=PPOConfig(clip=0.03, value_clip=0.1, value_weight=0.5, **options),
        reference=None,
        temperature=1.0,
        critic_rate=2.0,
    )


def value_params():
    model = random_params(LLAMA, seed=4)
    del model["head"]
    return {"model": model, "score": {"kernel": jnp.linspace(-1, 1, LLAMA.hidden_size)}}


def in_pieces(objective, params, batch):
    """Return loss and metrics of a batch as one, and as the sum of two microbatches, by one compiled program each."""
    totals = objective.totals(batch)
    sums = jax.jit(lambda piece: objective.loss_sums(params, None, piece, totals, train=True))
    halves = [jax.tree.map(lambda array: array[part::2], batch) for part in (0, 1)]  # noqa: B023
    results = []
    for pieces in ([batch], halves):
        loss, parts = jax.tree.map(lambda *each: sum(each), *(sums(piece) for piece in pieces))
        results.append((loss / totals["weight"], objective.metrics(parts, totals)))
    return results


def assert_all_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": 0.1},
        {"kl_coef": 0.0, "reduction": "token_mean", "ratio": "sequence", "clip_high": 0.02},
        {"kl_coef": 0.1, "reduction": "fixed", "ratio": "whole"},
    ],
)
def test_group_policy_is_the_loss_of_its_log_probabilities_and_adds_up_over_microbatches(options):
    objective, params = group_policy(**options), random_params(LLAMA)
    measured = jax.jit(objective.measure)(answers(), params, None, None)
    batch = rollout(measured.logps)
    if options["kl_coef"]:
        batch = batch.replace(ref_logps=near(measured.logps, 3))
    config = objective.config
    expected = grpo_loss(
        measured.logps,
        batch.old_logps,
        batch.ref_logps,
        batch.advantages,
        batch.rows.loss_weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high or config.clip_low,
        kl_coef=config.kl_coef,
        ratio=config.ratio,
        reduction=config.reduction,
        max_length=9,
    )
    whole, pieces = in_pieces(objective, params, batch)
    np.testing.assert_allclose(whole[0], expected, rtol=1e-5)
    assert_all_close(whole, pieces)
    assert 0 < whole[1]["clipped"] < 1 and whole[1]["loss"] == whole[0]


def test_one_update_measures_the_policy_itself():
    """It is the update of measured log-probabilities, in one piece or two, and tells how far others are from them."""
    params = random_params(LLAMA)
    objective = dataclasses.replace(group_policy(kl_coef=0.1), one_update=True)
    before = dataclasses.replace(objective, one_update=False)
    measured = jax.jit(before.measure)(answers(), params, None, None)
    assert objective.measure(answers(), params, None, None) == Measured(None)
    batch = rollout(measured.logps).replace(ref_logps=near(measured.logps, 3))
    gap = np.abs((batch.old_logps - measured.logps) * batch.rows.loss_weights).max()
    kl = np.sum(k3_kl(measured.logps, batch.ref_logps) * batch.rows.loss_weights) / ROWS
    optimizer = optax.sgd(1.0)
    mesh = make_mesh(devices=jax.devices()[:1])
    results = []
    for each, given, grad_accum in ((before, measured.logps, 1), (objective, batch.old_logps, 2)):
        state = TrainState(
            step=jnp.int32(0), params=params, opt_state=optimizer.init(params), rng=jnp.zeros(2, "uint32")
        )
        state = jax.device_put(jax.device_get(state), NamedSharding(mesh, PartitionSpec()))
        with jax.set_mesh(mesh):
            step = make_train_step(each, optimizer, state, mesh, grad_accum=grad_accum)
            results.append(step(state, batch.replace(old_logps=given), jnp.float32(1), None))
    (state, metrics), (expected, told) = results[::-1]
    assert_all_close(state.params, expected.params)
    np.testing.assert_allclose([metrics.pop("logp_gap"), metrics.pop("kl")], [gap, kl], rtol=1e-4)
    assert_all_close(metrics, told)


def test_the_temperature_of_sampling_is_that_of_the_loss():
    params = random_params(LLAMA)
    warm, cold = (
        jax.jit(dataclasses.replace(group_policy(), temperature=temperature).measure)(
            answers(), params, None, None
        ).logps
        for temperature in (1.0, 1e-3)
    )
    assert np.abs(warm - cold).max() > 1


def test_actor_critic_is_the_sum_of_its_losses_and_adds_up_over_microbatches():
    objective = actor_critic(pretrain_weight=0.3)
    params = {"policy": random_params(LLAMA), "critic": value_params()}
    measured = jax.jit(objective.measure)(answers(), params, None, None)
    batch = rollout(measured.logps, returns=None, old_values=None).replace(pretrain=answers(5))
    batch = batch.replace(old_values=measured.values + 0.1 * batch.old_values)
    mask = batch.rows.loss_weights
    texts = objective.forward.token_logps(params["policy"], None, batch.pretrain, train=True)
    expected = {
        "policy_loss": policy_loss(measured.logps, batch.old_logps, batch.advantages, mask, clip=0.03),
        "value_loss": value_loss(measured.values, batch.old_values, batch.returns, mask, clip=0.1),
        "pretrain_loss": -jnp.sum(texts) / jnp.sum(batch.pretrain.loss_weights),
    }
    whole, pieces = in_pieces(objective, params, batch)
    assert_all_close({name: whole[1][name] for name in expected}, expected)
    total = expected["policy_loss"] + 0.5 * expected["value_loss"] + 0.3 * expected["pretrain_loss"]
    np.testing.assert_allclose(whole[0], total, rtol=1e-5)
    assert_all_close(whole, pieces)
    assert 0 < whole[1]["value_clipped"] < 1


def test_the_policy_stands_still_while_the_value_model_warms_up():
    rates = [actor_critic(critic_warmup=3).learning_rates(0.1, step) for step in (2, 3)]
    assert [float(rate["policy"]) for rate in rates] == pytest.approx([0, 0.1])
    assert [float(rate["critic"]) for rate in rates] == pytest.approx([0.2, 0.2])


def test_answers_of_equal_groups_are_dropped_from_the_mean_too():
    rows = answers()
    measured = Measured(jnp.zeros((ROWS, LENGTH)))
    scores = jnp.float32([1, 1, 1, 1, 0, 1, 0, 1])
    batch = group_batch(
        rows, measured, Judged(scores), samples=SAMPLES, config=GRPOConfig(drop_equal_groups=True, eps=0.0)
    )
    assert not batch.rows.loss_weights[:SAMPLES].any()
    np.testing.assert_array_equal(batch.rows.loss_weights[SAMPLES:], rows.loss_weights[SAMPLES:])
    np.testing.assert_allclose(batch.advantages[SAMPLES:].max(axis=1), [-0.0, 1, -0.0, 1], atol=1e-6)
    assert group_policy().totals(batch)["weight"] == SAMPLES
    nothing = group_batch(
        rows, measured, Judged(0 * scores), samples=SAMPLES, config=GRPOConfig(drop_equal_groups=True)
    )
    assert group_policy().totals(nothing)["weight"] == 1


def test_process_supervision_rewards_what_led_to_a_step():
    rows = answers()
    first, last = (np.argmax(np.asarray(rows.loss_weights), axis=1), LENGTH - 1)
    last = np.array([np.flatnonzero(row).max() for row in np.asarray(rows.loss_weights)])
    middle = (first + last) // 2
    ends = jnp.int32(np.stack([middle, last], axis=1))
    scores = jnp.float32(np.tile([[1, 0], [0, 0], [0, 1], [1, 1]], (2, 1)))
    config = GRPOConfig(supervision="process", std="none")
    judged = Judged(scores.sum(axis=1), scores, ends)
    batch = group_batch(rows, Measured(jnp.zeros((ROWS, LENGTH))), judged, samples=SAMPLES, config=config)
    # Four of the eight steps of each group are worth 1.
    for row in range(ROWS):
        np.testing.assert_allclose(batch.advantages[row, first[row]], scores[row].sum() - 1)
        np.testing.assert_allclose(batch.advantages[row, last[row]], scores[row, 1] - 0.5)
    assert not batch.advantages[rows.loss_weights == 0].any()


def test_the_divergence_and_the_score_are_what_returns_add_up():
    rows = answers()
    mask = rows.loss_weights
    measured = Measured(-jnp.ones(mask.shape), -1.5 * jnp.ones(mask.shape), jnp.zeros(mask.shape))
    config = PPOConfig(lam=1.0, whiten_advantages=False)
    batch = actor_critic_batch(rows, measured, Judged(jnp.arange(8.0), kl_coef=jnp.float32(0.1)), config=config)
    for row in range(ROWS):
        slots = np.flatnonzero(mask[row])
        np.testing.assert_allclose(batch.returns[row, slots[0]], row - 0.1 * 0.5 * len(slots), rtol=1e-5)
    np.testing.assert_array_equal(batch.returns, batch.advantages)


def test_the_reference_of_an_adapter_is_what_it_stands_beside():
    adapter = AdapterConfig(rank=2)
    policy = forward(make_tuning(LLAMA, adapter))
    base = random_params(LLAMA)
    trained, frozen = policy.tuning.split(base)
    assert trained is None
    trained = jax.tree.map(
        lambda leaf: jnp.full(leaf.value.shape, 0.1),
        policy.tuning.trained(),
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )
    reference = Reference.create(policy, adapter, None)
    assert reference.is_base and reference.declarations() is None
    logps = jax.jit(reference.token_logps)(trained, frozen, None, answers())
    assert (
        np.abs(logps - jax.jit(functools.partial(policy.token_logps, train=True))(trained, frozen, answers())).max()
        > 0.1
    )
    other = Reference.create(policy, adapter, "elsewhere")
    assert not other.is_base
    np.testing.assert_allclose(jax.jit(other.token_logps)(trained, frozen, base, answers()), logps, atol=1e-6)
