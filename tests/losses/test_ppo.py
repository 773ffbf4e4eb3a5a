"""PPO's rewards, advantages and losses against goldens of four published settings, and their laws."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm.losses import (
    RunningMoments,
    gae,
    group_advantages,
    k1_kl,
    kl_rewards,
    llama2_scores,
    policy_loss,
    policy_terms,
    value_loss,
    value_terms,
    whiten,
)
from tests.losses.loss_goldens import Case, Reads, check

FAMILIES = [
    "qwen_kl004_vclip015",
    "internlm2_kl001_lam099_noclip_nowhiten",
    "llama2_kl001",
    "baichuan2_kl02_clip01",
]
ROLLOUT = ("old_logps", "ref_logps", "new_logps", "values_old", "values_new", "scores", "mask")


@pytest.fixture(scope="module")
def golden(goldens):
    return Reads(goldens / "losses/ppo.npz")


@pytest.mark.parametrize("family", FAMILIES)
def test_published_settings(golden, family):
    found = {key.removeprefix(f"{family}_"): golden[key] for key in golden if key.startswith(family)}
    old, ref, new, old_values, values, scores, mask = (golden[name] for name in ROLLOUT)
    mask = mask != 0
    kl, gamma, lam, clip, vclip = (float(found.pop(name)) for name in ("kl", "gamma", "lam", "clip", "vclip"))
    vclip = None if np.isnan(vclip) else vclip

    rewards, raw, returns, whitened = (found.pop(name) for name in ("rewards", "adv_raw", "returns", "adv_whitened"))
    advantages = whitened if found.pop("whiten_adv") else raw

    def advantages_and_returns(rewards, values):
        return jnp.stack(gae(rewards, values, mask, gamma=gamma, lam=lam))

    def policy(new, old, advantages):
        return policy_loss(new, old, advantages, mask, clip=clip)

    def value(values, old, returns):
        return value_loss(values, old, returns, mask, clip=vclip)

    kl_per_token = np.where(mask, found.pop("kl_per_token"), 0)
    loss, value_golden = found.pop("policy_loss"), found.pop("value_loss_no_coef")
    value_gradient = found.pop("dvalues_of_value_loss")
    check(
        {
            "kl": Case(lambda *logps: jnp.where(mask, k1_kl(*logps), 0), (old, ref), kl_per_token),
            "rewards": Case(lambda *arrays: kl_rewards(*arrays, mask, kl_coef=kl), (old, ref, scores), rewards),
            "gae": Case(advantages_and_returns, (rewards, old_values), np.stack([raw, returns])),
            "whiten": Case(lambda x: whiten(x, mask), (raw,), whitened),
            "policy loss": Case(policy, (new, old, advantages), loss, (found.pop("dlogps"),)),
            "value loss": Case(value, (values, old_values, returns), value_golden, (value_gradient,)),
        }
    )
    # verl's bound on the ratio of bad tokens, 3, is not reached here.
    np.testing.assert_allclose(found.pop("policy_loss_verl_dualclip3"), loss, rtol=1e-9)
    clipped = jax.jit(lambda *arrays: policy_terms(*arrays, mask, clip=clip).clipped)(new, old, advantages)
    assert abs(clipped[mask].mean() - found.pop("clipfrac")) < 1e-6
    clipped = jax.jit(lambda *arrays: value_terms(*arrays, mask, clip=vclip).clipped)(values, old_values, returns)
    assert abs(clipped[mask].mean() - found.pop("vf_clipfrac")) < 1e-6
    assert abs((np.square(new - old) / 2)[mask].mean() - found.pop("approxkl")) < 1e-6
    assert not found


def test_running_moments(golden):
    names = "mean", "std_ddof1", "mean_trl_float32", "std_trl_float32"
    expected = {name: golden[f"running_{name}"] for name in names}
    moments = RunningMoments()
    for index, batch in enumerate(golden["reward_batches"]):
        # Through JSON each time, as a resumed run has it.
        moments = RunningMoments(**json.loads(json.dumps(dataclasses.asdict(moments)))).update(batch)
        for name, tolerance in zip(names, (1e-12, 1e-12, 1e-6, 1e-6), strict=True):
            value = moments.mean if name.startswith("mean") else moments.std
            assert abs(value - expected[name][index]) < tolerance, name
        for divide, name in ((False, "reward_minus_mean"), (True, "reward_standardised")):
            found = moments.normalize(batch, divide=divide)
            np.testing.assert_allclose(found, golden[f"running_{name}"][index], rtol=1e-9, atol=1e-12)


@given(st.lists(hnp.arrays(np.float64, st.integers(0, 5), elements=st.floats(-1e3, 1e3)), max_size=5))
def test_running_moments_do_not_depend_on_batches(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    everything = np.concatenate([np.zeros(0), *batches])
    assert moments.count == everything.size
    if everything.size:
        np.testing.assert_allclose(moments.mean, everything.mean(), atol=1e-9)
    if everything.size > 1:
        np.testing.assert_allclose(moments.std, everything.std(ddof=1), atol=1e-6)
    assert np.isfinite(moments.normalize(everything, divide=True)).all()


def test_llama2_rewards(golden):
    """The paper's probabilities are sigmoids of scores, so the logit of the chosen one is its score."""
    probabilities = golden["l2_safety_prob"], golden["l2_helpful_prob"]
    scores = [np.log(p) - np.log1p(-p) for p in probabilities]
    tagged = golden["l2_is_safety_prompt"]
    logits = (golden["l2_logit"],)
    check(
        {
            "score": Case(lambda *scores: llama2_scores(*scores, tagged), scores, golden["l2_logit"]),
            "rc": Case(lambda *scores: jax.nn.sigmoid(llama2_scores(*scores, tagged)), scores, golden["l2_rc"]),
            "sample": Case(lambda x: whiten(x, np.ones_like(tagged)), logits, golden["l2_whiten_trl_ddof1"]),
            "population": Case(lambda x: group_advantages(x, len(tagged)), logits, golden["l2_whiten_popstd"]),
        }
    )


def test_nothing_of_the_golden_is_left_out(golden):
    prefixes = (*(f"{family}_" for family in FAMILIES), "running_", "l2_", "reward_batches")
    assert {key for key in golden if not key.startswith(prefixes)} == set(ROLLOUT)


def plain_gae(rewards, values, mask, gamma, lam):
    """The definition, over the trained choices alone."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        later_value = later_advantage = 0.0
        for slot in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, slot] + gamma * later_value - values[row, slot]
            later_value, later_advantage = values[row, slot], delta + gamma * lam * later_advantage
            advantages[row, slot] = later_advantage
    return advantages


jitted_gae = jax.jit(gae)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_gae_skips_what_is_outside_the_mask(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values, mask = (
        rng.normal(size=(2, 3, 7)).astype(np.float32),
        rng.normal(size=(3, 7)),
        rng.random((3, 7)) < 0.6,
    )
    rewards, values = rewards[0], values.astype(np.float32)
    rewards_around, values_around = np.where(mask, rewards, np.nan), np.where(mask, values, np.inf)
    advantages, returns = jitted_gae(rewards_around, values_around, mask, gamma=gamma, lam=lam)
    expected = plain_gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), rtol=1e-4, atol=1e-5)


def test_score_stands_on_the_last_token_of_each_answer():
    mask = jnp.array([[False, True, True, False], [True, False, False, False], [False] * 4])
    logps, scores = jnp.zeros((3, 4)), jnp.array([2.0, 3.0, 5.0])
    rewards = kl_rewards(logps, logps, scores, mask, kl_coef=0.1)
    np.testing.assert_array_equal(rewards, [[0, 0, 2, 0], [3, 0, 0, 0], [0] * 4])


def test_losses_read_nothing_outside_the_mask():
    """What stands on padding may overflow without spoiling losses or gradients."""
    mask = jnp.array([[True, True, False]])
    logps, old = jnp.array([[-1.0, -2.0, 0.0]]), jnp.array([[-1.1, -1.5, -1e4]])
    advantages = jnp.array([[1.0, -1.0, jnp.nan]])
    for function in (policy_loss, value_loss):
        loss_and_gradient = jax.jit(jax.value_and_grad(functools.partial(function, clip=0.2)))
        loss, gradient = loss_and_gradient(logps, old, advantages, mask)
        assert np.isfinite(loss) and np.isfinite(gradient).all() and gradient[0, 2] == 0


def test_whitened_values_have_mean_0_and_deviation_1():
    x, mask = jnp.array([[1.0, 2.0, 4.0, 1e9]]), jnp.array([[1, 1, 1, 0]])
    found = np.asarray(whiten(x, mask))
    np.testing.assert_allclose([found[0, :3].mean(), found[0, :3].std(ddof=1)], [0, 1], atol=1e-6)
    assert found[0, 3] == 0
    np.testing.assert_array_equal(whiten(jnp.full((1, 3), 0.5), jnp.ones((1, 3))), 0)
